"""RMSNorm's kernels."""

from __future__ import annotations

import pytest
import torch

from .kernel_checks import (
    BFLOAT16,
    DTYPES,
    check_against_float64,
    check_backward_makes_no_zeros,
    check_full_graph,
    check_gradients_numerically,
    check_operator,
    maker,
)


@pytest.fixture
def rmsnorm():
    from cs336_triton.rmsnorm import rmsnorm

    return rmsnorm


def arguments(make, rows, columns, *, scale=1.0):
    return {"x": make.normal(*rows, columns, scale=scale), "weight": make.normal(columns, mean=1.0), "eps": 1e-5}


@pytest.mark.parametrize("columns", [1, 63, 123, 760, 1000, 1128])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(rmsnorm, dtype, columns):
    check_against_float64("rmsnorm", rmsnorm, arguments(maker(dtype), (3, 5), columns))


def test_float64_stays_float64(rmsnorm):
    check_against_float64("rmsnorm", rmsnorm, arguments(maker("float64"), (5,), 63))


@pytest.mark.parametrize("rows", [(), (0, 4), (1,), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(rmsnorm, rows):
    check_against_float64("rmsnorm", rmsnorm, arguments(maker(), rows, 37))


@pytest.mark.parametrize("columns", [8193, 16385])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_longer_than_a_tile_are_walked(rmsnorm, dtype, columns):
    check_against_float64("rmsnorm", rmsnorm, arguments(maker(dtype), (3,), columns))


def test_more_rows_than_programs(rmsnorm):
    check_against_float64("rmsnorm", rmsnorm, arguments(maker(), (67,), 2100))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_padded_strides(rmsnorm, dtype):
    check_against_float64("rmsnorm", rmsnorm, arguments(maker(dtype, strided=True), (3, 5), 63))


def test_transposed_input_and_expanded_gradient(rmsnorm):
    make = maker()
    transposed, weight = make.normal(7, 5).t().requires_grad_(), make.normal(7)
    plain = transposed.detach().contiguous().requires_grad_()
    result, expected = rmsnorm(transposed, weight), rmsnorm(plain, weight)
    assert torch.equal(result, expected)
    # The gradient of a sum is one number, expanded: its strides are 0.
    (gradient,) = torch.autograd.grad(result.sum(), transposed)
    (expected_gradient,) = torch.autograd.grad(expected, plain, torch.ones(5, 7, device=plain.device))
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_small_and_large_values(rmsnorm, scale):
    check_against_float64("rmsnorm", rmsnorm, arguments(maker(), (4,), 41, scale=scale))


def test_weight_of_another_dtype(rmsnorm):
    make = maker()
    x, weight = make.normal(3, 9).half(), make.normal(9)
    result = rmsnorm(x, weight)
    assert result.dtype == torch.float16
    expected = torch.nn.functional.rms_norm(x.double(), (9,), weight.double(), 1e-5)
    torch.testing.assert_close(result.double(), expected, rtol=2**-10, atol=2**-20)


def test_backward_makes_no_zeros(rmsnorm):
    leaves = [maker().normal(5, 9).requires_grad_(), maker().normal(9).requires_grad_()]
    check_backward_makes_no_zeros(rmsnorm(*leaves), leaves)


def test_operator(rmsnorm):
    from cs336_triton.rmsnorm import _operator

    make = maker()
    x, weight = make.normal(3, 9).requires_grad_(), make.normal(9).requires_grad_()
    check_operator(_operator, (x, weight, 1e-5))


def test_compiles_whole(rmsnorm):
    check_full_graph(rmsnorm, maker().normal(3, 9), maker().normal(9))


def test_gradcheck(rmsnorm):
    check_gradients_numerically(rmsnorm, maker().normal(3, 5), maker().normal(5))
