"""The fused residual addition and RMSNorm."""

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
def add_rmsnorm():
    from cs336_triton.add_rmsnorm import add_rmsnorm

    return add_rmsnorm


def arguments(make, rows, columns):
    return {
        "x": make.normal(*rows, columns),
        "residual": make.normal(*rows, columns),
        "weight": make.normal(columns, mean=1.0),
        "eps": 1e-5,
    }


@pytest.mark.parametrize("columns", [1, 63, 123, 760, 1000, 1128, 8193])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(add_rmsnorm, dtype, columns):
    check_against_float64("add_rmsnorm", add_rmsnorm, arguments(maker(dtype), (2, 2), columns))


def test_float64_stays_float64(add_rmsnorm):
    check_against_float64("add_rmsnorm", add_rmsnorm, arguments(maker("float64"), (5,), 63))


def test_rows_longer_than_a_tile_are_walked(add_rmsnorm):
    check_against_float64("add_rmsnorm", add_rmsnorm, arguments(maker(), (2,), 16385))


@pytest.mark.parametrize("rows", [(), (0, 4), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(add_rmsnorm, rows):
    check_against_float64("add_rmsnorm", add_rmsnorm, arguments(maker(), rows, 37))


def test_padded_strides(add_rmsnorm):
    check_against_float64("add_rmsnorm", add_rmsnorm, arguments(maker(strided=True), (3, 5), 63))


@pytest.mark.parametrize("used", ["normed", "total"])
def test_a_result_that_is_not_used_has_no_gradient(add_rmsnorm, used):
    make = maker()
    leaves = [make.normal(5, 9).requires_grad_(), make.normal(5, 9).requires_grad_(), make.normal(9).requires_grad_()]
    normed, total = add_rmsnorm(*leaves)
    x, residual, weight = leaves
    if used == "total":
        found = torch.autograd.grad(total.square().sum(), leaves, allow_unused=True)
        assert torch.equal(found[0], 2 * total) and torch.equal(found[1], 2 * total) and found[2] is None
        return
    found = torch.autograd.grad(normed.square().sum(), leaves)
    sums = (x + residual).detach().requires_grad_()
    expected = torch.nn.functional.rms_norm(sums, (9,), weight, 1e-5).square().sum()
    sum_gradient, weight_gradient = torch.autograd.grad(expected, [sums, weight])
    torch.testing.assert_close(found[0], sum_gradient)
    torch.testing.assert_close(found[1], sum_gradient)
    torch.testing.assert_close(found[2], weight_gradient)


def test_operator():
    from cs336_triton.add_rmsnorm import _operator

    make = maker()
    x, residual, weight = make.normal(3, 9), make.normal(3, 9), make.normal(9)
    check_operator(_operator, (x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_(), 1e-5))


def test_compiles_whole(add_rmsnorm):
    check_full_graph(add_rmsnorm, maker().normal(3, 9), maker(seed=1).normal(3, 9), maker().normal(9))


def test_gradcheck(add_rmsnorm):
    check_gradients_numerically(add_rmsnorm, maker().normal(3, 5), maker(seed=1).normal(3, 5), maker().normal(5))
