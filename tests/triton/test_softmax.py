"""Softmax's kernels."""

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
def softmax():
    from cs336_triton.softmax import softmax

    return softmax


def arguments(make, *shape, dim=-1, scale=3.0, mean=0.0):
    return {"x": make.normal(*shape, scale=scale, mean=mean), "dim": dim}


@pytest.mark.parametrize("columns", [1, 63, 123, 760, 1000, 1128])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(softmax, dtype, columns):
    check_against_float64("softmax", softmax, arguments(maker(dtype), 3, 5, columns))


def test_float64_stays_float64(softmax):
    check_against_float64("softmax", softmax, arguments(maker("float64"), 5, 63))


@pytest.mark.parametrize("columns", [16385, 32769])
def test_rows_longer_than_a_tile_are_walked(softmax, columns):
    """The backward pass walks from 16385 columns on, the forward pass from 32769 on."""
    check_against_float64("softmax", softmax, arguments(maker(), 2, columns))


@pytest.mark.parametrize("columns", [16385, 32768])
def test_long_rows_are_pipelined(softmax, columns):
    """More rows than programs."""
    check_against_float64("softmax", softmax, arguments(maker(strided=True), 5, columns))


@pytest.mark.parametrize("columns", [37, 10000, 40000])
def test_masked_scores(softmax, columns):
    """-inf anywhere, also in all the first tiles of a row that is walked."""
    make = maker()
    x = make.normal(3, columns)
    x[0, : columns - 2] = -float("inf")
    x[1, 5:9] = -float("inf")
    x[2, -3:] = -float("inf")
    check_against_float64("softmax", softmax, {"x": x, "dim": -1}, gradients=False)
    result = softmax(x)
    assert (result[0, : columns - 2] == 0).all() and (result[1, 5:9] == 0).all()


@pytest.mark.parametrize("dim", [0, 1, 2, -3, -2, -1])
def test_any_dimension(softmax, dim):
    check_against_float64("softmax", softmax, arguments(maker(), 4, 5, 6, dim=dim))


@pytest.mark.parametrize("shape", [(7,), (0, 4), (2, 0, 3)], ids=str)
def test_vectors_and_empty_tensors(softmax, shape):
    check_against_float64("softmax", softmax, arguments(maker(), *shape))


def test_padded_strides(softmax):
    check_against_float64("softmax", softmax, arguments(maker(strided=True), 3, 5, 63))


@pytest.mark.parametrize("columns", [123, 33000])
def test_large_scores(softmax, columns):
    check_against_float64("softmax", softmax, arguments(maker(), 2, columns, mean=1e4))


def test_operator():
    from cs336_triton.softmax import _operator

    check_operator(_operator, (maker().normal(3, 9).requires_grad_(),))


def test_compiles_whole(softmax):
    check_full_graph(softmax, maker().normal(3, 9))


@pytest.mark.parametrize("dim", [0, 1])
def test_gradcheck(softmax, dim):
    check_gradients_numerically(lambda x: softmax(x, dim), maker().normal(3, 5))


def test_gradcheck_of_a_walked_row(softmax, monkeypatch):
    import cs336_triton.softmax as module

    monkeypatch.setattr(module, "WIDEST_TILE", 4)
    monkeypatch.setattr(module, "WIDEST_BACKWARD_BYTES", 32)
    monkeypatch.setattr(module, "walking_tiles", lambda card: (module.Configuration.of(BLOCK=4, ROWS=1, STAGES=1),))
    x = maker("float64").normal(3, 11)
    torch.testing.assert_close(softmax(x), x.softmax(-1))
    check_gradients_numerically(softmax, x)
