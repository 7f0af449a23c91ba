"""SiLU's kernels."""

from __future__ import annotations

import pytest
import torch

from .kernel_checks import (
    BFLOAT16,
    DTYPES,
    check_against_float64,
    check_full_graph,
    check_gradients_numerically,
    check_operator,
    maker,
)


@pytest.fixture
def silu():
    from cs336_triton.silu import silu

    return silu


def arguments(make, *shape):
    return {"x": make.normal(*shape, scale=4.0)}


@pytest.mark.parametrize("columns", [1, 63, 123, 760, 1000, 1128])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(silu, dtype, columns):
    check_against_float64("silu", silu, arguments(maker(dtype), 3, 5, columns))


def test_float64_stays_float64(silu):
    check_against_float64("silu", silu, arguments(maker("float64"), 5, 63))


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (2, 3, 4, 5)], ids=str)
def test_any_shape(silu, shape):
    check_against_float64("silu", silu, arguments(maker(), *shape))


@pytest.mark.parametrize("columns", [1, 63, 2500])
def test_padded_strides(silu, columns):
    check_against_float64("silu", silu, arguments(maker(strided=True), 3, 5, columns))


def test_transposed(silu):
    check_against_float64("silu", silu, {key: value.t() for key, value in arguments(maker(), 7, 5).items()})


def test_far_from_zero_nothing_overflows(silu):
    x = maker().tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4]).requires_grad_()
    result = silu(x)
    torch.testing.assert_close(result, torch.nn.functional.silu(x), rtol=1e-5, atol=1e-30)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    expected = maker().tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-30)


def test_operator():
    from cs336_triton.silu import _operator

    make = maker()
    check_operator(_operator, (make.normal(3, 9).requires_grad_(),))


def test_compiles_whole(silu):
    check_full_graph(silu, maker().normal(3, 9))


def test_gradcheck(silu):
    check_gradients_numerically(silu, maker().normal(3, 5))
