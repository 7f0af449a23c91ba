"""Softmax: rows of up to 32768 entries are held in registers and read once; longer ones are read twice, online.

From 16384 entries on, one or two programs fill a multiprocessor. Where it is one, each takes row after row forward and
has the next ones on their way while it works on one; elsewhere a program takes one tile of rows.

The online pass keeps one running maximum and one running sum per lane of the tile, so that the lanes meet only once, at
the row's end. Another dimension than the last is brought to the end first, which copies unless its stride is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cs336_registry.components.softmax import check

from .configurations import Configuration, configuration
from .operators import differentiable, operator
from .runtime import (
    PRODUCTION_DTYPES,
    Card,
    accumulator,
    card,
    cdiv,
    dtype_name,
    launch,
    meta,
    narrow,
    next_power_of_2,
    rows_of,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

WIDEST_TILE = 32768
WIDEST_BACKWARD_BYTES = 65536
"""The backward pass holds two rows at once: 32768 entries of each in 4 bytes would not fit the registers."""
WIDEST_ALONE = 16384
"""Longer rows are pipelined forward: of 32 warps of 32 entries a thread only one program fits, and nothing would be
read while it computes. On an H200, 16384 x 16384 took 268 us in single tiles and 275 us or more pipelined, 8192 x 32768
took 376 and 276 us."""


def softmax(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """`exp(x - max(x)) / sum(exp(x - max(x)))` along `dim`; see the contract."""
    check(x, dim)
    if dim in (-1, x.ndim - 1):
        return _operator(x)
    return _operator(x.movedim(dim, -1)).movedim(-1, dim)


LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(x):
    """exp(x): three instructions less than tl.exp, which spends them on results below 2^-126; here those are 0."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def exp_difference(x, highest):
    """exp(x - highest), and 0 rather than NaN where both are -inf."""
    return exponential(x - tl.where(highest == -float("inf"), 0.0, highest))


@triton.jit
def forward_kernel(
    x_pointer,
    output_pointer,
    n_rows,
    n_cols,
    x_stride,
    ACCUMULATOR: tl.constexpr,
    WALK: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_rows = rows < n_rows
    x_rows = x_pointer + rows * x_stride
    output_rows = output_pointer + rows * n_cols
    if WALK:
        highest = tl.full((ROWS, BLOCK), -float("inf"), dtype=ACCUMULATOR)
        total = tl.zeros((ROWS, BLOCK), dtype=ACCUMULATOR)
        for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
            mask = in_rows & (start + columns < n_cols)
            x = tl.load(x_rows + start + columns, mask=mask, other=-float("inf")).to(ACCUMULATOR)
            higher = tl.maximum(highest, x)
            total = total * exp_difference(highest, higher) + exp_difference(x, higher)
            highest = higher
        row_highest = tl.max(highest, axis=1, keep_dims=True)
        # One division a row: each costs several instructions, and the product adds one rounding error at most.
        inverse = 1.0 / tl.sum(total * exp_difference(highest, row_highest), axis=1, keep_dims=True)
        for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
            mask = in_rows & (start + columns < n_cols)
            x = tl.load(x_rows + start + columns, mask=mask, other=-float("inf")).to(ACCUMULATOR)
            output = narrow(exponential(x - row_highest) * inverse, output_pointer.dtype.element_ty)
            tl.store(output_rows + start + columns, output, mask=mask)
    else:
        # A row beyond the last reads zeros, not -inf, whose differences would be NaN.
        mask = in_rows & (columns < n_cols)
        x = tl.load(x_rows + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        x = tl.where(columns < n_cols, x, -float("inf"))
        weights = exponential(x - tl.max(x, axis=1, keep_dims=True))
        inverse = 1.0 / tl.sum(weights, axis=1, keep_dims=True)
        output = narrow(weights * inverse, output_pointer.dtype.element_ty)
        tl.store(output_rows + columns, output, mask=mask)


@triton.jit
def pipelined_forward_kernel(
    x_pointer,
    output_pointer,
    n_rows,
    n_cols,
    x_stride,
    ACCUMULATOR: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Long rows, one after another: the next ones are on their way from memory while one is worked on."""
    columns = tl.arange(0, BLOCK)
    in_columns = columns < n_cols
    for row in tl.range(tl.program_id(0).to(tl.int64), n_rows, tl.num_programs(0), num_stages=STAGES):
        x = tl.load(x_pointer + row * x_stride + columns, mask=in_columns, other=-float("inf")).to(ACCUMULATOR)
        weights = exponential(x - tl.max(x, axis=0))
        inverse = 1.0 / tl.sum(weights, axis=0)
        output = narrow(weights * inverse, output_pointer.dtype.element_ty)
        tl.store(output_pointer + row * n_cols + columns, output, mask=in_columns)


@triton.jit
def backward_kernel(
    grad_pointer,
    output_pointer,
    x_grad_pointer,
    n_rows,
    n_cols,
    grad_stride,
    ACCUMULATOR: tl.constexpr,
    WALK: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = y (dy - sum(y dy))."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_rows = rows < n_rows
    grad_rows = grad_pointer + rows * grad_stride
    output_rows = output_pointer + rows * n_cols
    x_grad_rows = x_grad_pointer + rows * n_cols
    if WALK:
        products = tl.zeros((ROWS, BLOCK), dtype=ACCUMULATOR)
        for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
            mask = in_rows & (start + columns < n_cols)
            grad = tl.load(grad_rows + start + columns, mask=mask, other=0.0).to(ACCUMULATOR)
            products += grad * tl.load(output_rows + start + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        projection = tl.sum(products, axis=1, keep_dims=True)
        for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
            mask = in_rows & (start + columns < n_cols)
            grad = tl.load(grad_rows + start + columns, mask=mask, other=0.0).to(ACCUMULATOR)
            output = tl.load(output_rows + start + columns, mask=mask, other=0.0).to(ACCUMULATOR)
            x_grad = narrow(output * (grad - projection), x_grad_pointer.dtype.element_ty)
            tl.store(x_grad_rows + start + columns, x_grad, mask=mask)
    else:
        mask = in_rows & (columns < n_cols)
        grad = tl.load(grad_rows + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        output = tl.load(output_rows + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        x_grad = output * (grad - tl.sum(grad * output, axis=1, keep_dims=True))
        tl.store(x_grad_rows + columns, narrow(x_grad, x_grad_pointer.dtype.element_ty), mask=mask)


def default_tile(card: Card, *, block: int, backward: bool) -> Configuration:
    """About 2048 entries a tile, 16 to 32 a thread; backward, the longest rows take 64, which spill as little: 376 us
    with 16 warps and 396 with 32 at 8192 x 32768 on an H200."""
    rows = max(1, 2048 // block)
    num_warps = 16 if backward and block > 16384 else min(32, max(4, rows * block // 512))
    return Configuration.of(num_warps=num_warps, ROWS=rows)


def pipelined_tiles(card: Card, *, block: int, dtype: torch.dtype) -> tuple[Configuration, ...]:
    """STAGES = n keeps n - 1 rows on their way, as far as shared memory holds them."""
    most = min(3, 1 + card.shared_memory // (block * dtype.itemsize + 2048))
    deepest = [stages for stages in (3, 2, 1) if stages <= most]
    return tuple(Configuration.of(num_warps=warps, STAGES=stages) for warps in (32, 16) for stages in deepest)


def default_walk(card: Card) -> Configuration:
    return walking_tiles(card)[0]


def walking_tiles(card: Card) -> tuple[Configuration, ...]:
    """For rows that are read twice: many warps a row, so that few rows are at work and the cache still holds them.

    STAGES = n keeps n - 1 tiles on their way from memory while one is worked on.
    """
    return tuple(
        Configuration.of(num_warps=warps, ROWS=1, BLOCK=block, STAGES=stages)
        for stages in (1, 2, 3)
        for warps, block in ((32, 4096), (16, 8192), (32, 8192), (32, 16384), (16, 4096), (8, 4096))
    )


def _launch(kernel: Any, rows: Tensor, row_stride: int, n_cols: int, others: tuple[Tensor, ...], widest: int) -> None:
    backward = kernel is backward_kernel
    name = "softmax_backward" if backward else "softmax_forward"
    walk, block, stages = n_cols > widest, next_power_of_2(n_cols), 1
    if walk:
        chosen = configuration(name, rows.device, rows.dtype, "walk", default_walk, candidates=walking_tiles)
        block, stages = chosen["BLOCK"], chosen["STAGES"]
    else:
        default = partial(default_tile, block=block, backward=backward)
        chosen = configuration(name, rows.device, rows.dtype, str(block), default)
    n_rows, tile = rows.numel() // n_cols, chosen["ROWS"]
    launch(
        kernel,
        (cdiv(n_rows, tile),),
        rows,
        *others,
        n_rows,
        n_cols,
        row_stride,
        ACCUMULATOR=accumulator(rows.dtype),
        WALK=walk,
        STAGES=stages,
        ROWS=tile,
        BLOCK=block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def _launch_pipelined(rows: Tensor, row_stride: int, n_cols: int, output: Tensor) -> None:
    n_rows, block = rows.numel() // n_cols, next_power_of_2(n_cols)
    candidates = partial(pipelined_tiles, block=block, dtype=rows.dtype)
    chosen = configuration(
        "softmax_forward",
        rows.device,
        rows.dtype,
        str(block),
        lambda card: candidates(card)[0],
        candidates=candidates,
    )
    # At 32 entries a thread, 1024 threads take all registers of a multiprocessor.
    launch(
        pipelined_forward_kernel,
        (min(card(rows.device).multiprocessors, n_rows),),
        rows,
        output,
        n_rows,
        n_cols,
        row_stride,
        ACCUMULATOR=accumulator(rows.dtype),
        BLOCK=block,
        **chosen.keywords,
    )


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        for n_rows, n_cols in ((65536, 512), (16384, 4096), (16384, 16384), (8192, 32768), (4096, 131072)):
            x = meta(n_rows, n_cols, dtype=dtype)
            yield f"softmax_forward_{dtype_name(dtype)}_{n_cols}", partial(_forward, x)
            yield f"softmax_backward_{dtype_name(dtype)}_{n_cols}", partial(_backward, x, x)


def _forward(x: Tensor) -> Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        n_cols = x.shape[-1]
        rows, row_stride = rows_of(x, n_cols)
        if WIDEST_ALONE < n_cols <= WIDEST_TILE:
            _launch_pipelined(rows, row_stride, n_cols, output)
        else:
            _launch(forward_kernel, rows, row_stride, n_cols, (output,), WIDEST_TILE)
    return output


def _backward(grad: Tensor, output: Tensor) -> Tensor:
    x_grad = torch.empty_like(output, memory_format=torch.contiguous_format)
    if grad.numel():
        n_cols = grad.shape[-1]
        rows, row_stride = rows_of(grad, n_cols)
        widest = WIDEST_BACKWARD_BYTES // grad.dtype.itemsize
        _launch(backward_kernel, rows, row_stride, n_cols, (output.contiguous(), x_grad), widest)
    return x_grad


_operator = operator("softmax(Tensor x) -> Tensor", _forward, lambda x: x.new_empty(x.shape))
_backward_operator = operator(
    "softmax_backward(Tensor grad, Tensor output) -> Tensor",
    _backward,
    lambda grad, output: output.new_empty(output.shape),
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output)


def _gradients(ctx: Any, grad: Tensor) -> Tensor:
    return _backward_operator(grad, *ctx.saved_tensors)


differentiable(_operator, _gradients, _setup_context)
