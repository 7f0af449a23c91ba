"""SwiGLU's elementwise kernels."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from cs336_triton.swiglu import tile_of_rows

from .kernel_checks import (
    BFLOAT16,
    DEVICE,
    DTYPES,
    check_against_float64,
    check_full_graph,
    check_gradients_numerically,
    check_operator,
    maker,
)


@triton.jit
def first_entry_kernel(output_pointer, n_cols, BLOCK: tl.constexpr):
    rows, columns, _ = tile_of_rows(1, n_cols, 1, BLOCK)
    program = output_pointer + 2 * tl.program_id(0).to(tl.int64)
    tl.store(program, tl.min(tl.min(rows, axis=1), axis=0))
    tl.store(program + 1, tl.min(tl.min(columns, axis=1), axis=0))


def test_a_row_may_end_just_before_two_to_the_31():
    """The number of tiles, (n_cols + BLOCK - 1) // BLOCK, does not wrap around."""
    first = torch.full((2, 2), -1, dtype=torch.int64, device=DEVICE)
    first_entry_kernel[(2,)](first, 2**31 - 1, BLOCK=1024)
    assert first.tolist() == [[0, 0], [0, 1024]]


@pytest.fixture
def swiglu():
    from cs336_triton.swiglu import swiglu

    return swiglu


def arguments(make, *shape):
    return {"gate": make.normal(*shape, scale=4.0), "up": make.normal(*shape)}


@pytest.mark.parametrize("columns", [1, 63, 123, 760, 1000, 1128])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(swiglu, dtype, columns):
    check_against_float64("swiglu", swiglu, arguments(maker(dtype), 3, 5, columns))


def test_float64_stays_float64(swiglu):
    check_against_float64("swiglu", swiglu, arguments(maker("float64"), 5, 63))


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (2, 3, 4, 5)], ids=str)
def test_any_shape(swiglu, shape):
    check_against_float64("swiglu", swiglu, arguments(maker(), *shape))


@pytest.mark.parametrize("columns", [1, 63, 2500])
def test_padded_strides(swiglu, columns):
    check_against_float64("swiglu", swiglu, arguments(maker(strided=True), 3, 5, columns))


def test_transposed(swiglu):
    check_against_float64("swiglu", swiglu, {key: value.t() for key, value in arguments(maker(), 7, 5).items()})


def test_halves_of_one_projection(swiglu):
    """The usual operands: two views of one matrix, whose rows are twice as far apart as they are long."""
    both = maker("float16").normal(6, 126)
    gate, up = both.chunk(2, dim=-1)
    check_against_float64("swiglu", swiglu, {"gate": gate, "up": up})
    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))


def test_operator():
    from cs336_triton.swiglu import _operator

    make = maker()
    check_operator(_operator, (make.normal(3, 9).requires_grad_(), make.normal(3, 9).requires_grad_()))


def test_compiles_whole(swiglu):
    check_full_graph(swiglu, maker().normal(3, 9), maker(seed=1).normal(3, 9))


def test_gradcheck(swiglu):
    check_gradients_numerically(swiglu, maker().normal(3, 5), maker(seed=1).normal(3, 5))
