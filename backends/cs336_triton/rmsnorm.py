"""RMSNorm: one read and one write forward; backward, a persistent grid that keeps partial sums of dW in registers.

Forward: a program normalises a tile of whole rows and keeps `1 / rms` of each in float32. Backward: one or two programs
a multiprocessor walk over the rows, each adding `dy * x / rms` to one float32 partial row of dW; a second, small kernel
adds the partial rows in a fixed order, so that dW is bitwise repeatable. Rows that do not fit a tile are
walked in tiles of a fixed width, and dW is then summed column tile by column tile.
The same kernels with ADD serve add_rmsnorm.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cs336_registry.components.rmsnorm import check

from .configurations import Configuration, configuration
from .operators import differentiable, operator, scalar
from .runtime import (
    PRODUCTION_DTYPES,
    Card,
    accumulator,
    accumulator_dtype,
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

WIDEST_TILE = 16384
"""Longer rows are walked in tiles: a forward tile is a row in registers, and 16384 entries are what 16 warps hold."""
WIDEST_BACKWARD_TILE = 16384
"""The backward tile holds x, dy and the partial sum of dW at once, and the weight too up to WIDEST_WITH_WEIGHT."""
WIDEST_WITH_WEIGHT = 8192
WALKING_TILE = 4096


def rmsnorm(
    x: Float[Tensor, "... d_model"], weight: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "... d_model"]:
    """`x / sqrt(mean(x², -1) + eps) * weight` in one pass over x; see the contract."""
    check(x, weight, eps)
    return _operator(x, weight, eps)[0]


@triton.jit
def forward_kernel(
    x_pointer,
    residual_pointer,
    weight_pointer,
    normed_pointer,
    total_pointer,
    rstd_pointer,
    n_rows,
    n_cols,
    x_stride,
    residual_stride,
    eps: tl.float64,
    ACCUMULATOR: tl.constexpr,
    ADD: tl.constexpr,
    WALK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """normed = (x [+ residual]) * rstd * weight; total = x + residual where ADD."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_rows = rows < n_rows
    x_rows = x_pointer + rows * x_stride
    residual_rows = residual_pointer + rows * residual_stride
    normed_rows = normed_pointer + rows * n_cols
    total_rows = total_pointer + rows * n_cols
    if WALK:
        squares = tl.zeros((ROWS, BLOCK), dtype=ACCUMULATOR)
        for start in range(0, n_cols, BLOCK):
            at = start + columns
            mask = in_rows & (at < n_cols)
            value = tl.load(x_rows + at, mask=mask, other=0.0).to(ACCUMULATOR)
            if ADD:
                value += tl.load(residual_rows + at, mask=mask, other=0.0).to(ACCUMULATOR)
                value = narrow(value, total_pointer.dtype.element_ty)
                tl.store(total_rows + at, value, mask=mask)
                value = value.to(ACCUMULATOR)
            squares += value * value
        mean_of_squares = tl.sum(squares, axis=1, keep_dims=True) / n_cols
        rstd = tl.rsqrt(tl.where(in_rows, mean_of_squares + scalar(eps, ACCUMULATOR), 1.0))
        tl.store(rstd_pointer + rows, rstd, mask=in_rows)
        for start in range(0, n_cols, BLOCK):
            at = start + columns
            mask = in_rows & (at < n_cols)
            if ADD:
                # Added again rather than read back, so that no thread waits for another's store.
                value = tl.load(x_rows + at, mask=mask, other=0.0).to(ACCUMULATOR)
                value += tl.load(residual_rows + at, mask=mask, other=0.0).to(ACCUMULATOR)
                value = narrow(value, total_pointer.dtype.element_ty).to(ACCUMULATOR)
            else:
                value = tl.load(x_rows + at, mask=mask, other=0.0).to(ACCUMULATOR)
            weight = tl.load(weight_pointer + at, mask=at < n_cols, other=0.0).to(ACCUMULATOR)
            tl.store(normed_rows + at, narrow(value * rstd * weight, normed_pointer.dtype.element_ty), mask=mask)
    else:
        in_columns = columns < n_cols
        mask = in_rows & in_columns
        weight = tl.load(weight_pointer + columns, mask=in_columns, other=0.0).to(ACCUMULATOR)
        value = tl.load(x_rows + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        if ADD:
            value += tl.load(residual_rows + columns, mask=mask, other=0.0).to(ACCUMULATOR)
            value = narrow(value, total_pointer.dtype.element_ty)
            tl.store(total_rows + columns, value, mask=mask)
            value = value.to(ACCUMULATOR)
        mean_of_squares = tl.sum(value * value, axis=1, keep_dims=True) / n_cols
        # A row beyond the last has no squares, and eps may be 0.
        rstd = tl.rsqrt(tl.where(in_rows, mean_of_squares + scalar(eps, ACCUMULATOR), 1.0))
        tl.store(rstd_pointer + rows, rstd, mask=in_rows)
        tl.store(normed_rows + columns, narrow(value * rstd * weight, normed_pointer.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_pointer,
    total_grad_pointer,
    x_pointer,
    weight_pointer,
    rstd_pointer,
    x_grad_pointer,
    partial_pointer,
    n_rows,
    n_cols,
    grad_stride,
    total_grad_stride,
    x_stride,
    ACCUMULATOR: tl.constexpr,
    ADD: tl.constexpr,
    KEEP_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = rstd * (w dy - x rstd mean(w dy x rstd)) [+ total_grad where ADD], and one partial row of dW a program.

    Where a row is so long that x, dy and the partial row fill the registers, the weight is read again for each row: it
    lies in the cache.
    """
    columns = tl.arange(0, BLOCK)[None, :]
    in_columns = columns < n_cols
    if KEEP_WEIGHT:
        weight = tl.load(weight_pointer + columns, mask=in_columns, other=0.0).to(ACCUMULATOR)
    weight_grad = tl.zeros((ROWS, BLOCK), dtype=ACCUMULATOR)
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0).to(tl.int64) * ROWS, n_rows, step, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = rows < n_rows
        mask = in_rows & in_columns
        value = tl.load(x_pointer + rows * x_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        grad = tl.load(grad_pointer + rows * grad_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        rstd = tl.load(rstd_pointer + rows, mask=in_rows, other=0.0)
        normal = value * rstd
        weight_grad += grad * normal
        if not KEEP_WEIGHT:
            weight = tl.load(weight_pointer + columns, mask=in_columns, other=0.0).to(ACCUMULATOR)
        grad *= weight
        projection = tl.sum(grad * normal, axis=1, keep_dims=True) / n_cols
        x_grad = rstd * (grad - normal * projection)
        if ADD:
            x_grad += tl.load(total_grad_pointer + rows * total_grad_stride + columns, mask=mask, other=0.0).to(
                ACCUMULATOR
            )
        tl.store(x_grad_pointer + rows * n_cols + columns, narrow(x_grad, x_grad_pointer.dtype.element_ty), mask=mask)
    at = tl.program_id(0).to(tl.int64) * n_cols + tl.arange(0, BLOCK)
    tl.store(partial_pointer + at, tl.sum(weight_grad, axis=0), mask=tl.arange(0, BLOCK) < n_cols)


@triton.jit
def walking_input_gradient_kernel(
    grad_pointer,
    total_grad_pointer,
    x_pointer,
    weight_pointer,
    rstd_pointer,
    x_grad_pointer,
    n_cols,
    grad_stride,
    total_grad_stride,
    x_stride,
    ACCUMULATOR: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of one row that is longer than a tile."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_pointer + row)
    products = tl.zeros((BLOCK,), dtype=ACCUMULATOR)
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n_cols
        value = tl.load(x_pointer + row * x_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        grad = tl.load(grad_pointer + row * grad_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        weight = tl.load(weight_pointer + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        products += grad * weight * (value * rstd)
    projection = tl.sum(products, axis=0) / n_cols
    for start in range(0, n_cols, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n_cols
        value = tl.load(x_pointer + row * x_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        grad = tl.load(grad_pointer + row * grad_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        weight = tl.load(weight_pointer + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        x_grad = rstd * (grad * weight - value * rstd * projection)
        if ADD:
            x_grad += tl.load(total_grad_pointer + row * total_grad_stride + columns, mask=mask, other=0.0).to(
                ACCUMULATOR
            )
        tl.store(x_grad_pointer + row * n_cols + columns, narrow(x_grad, x_grad_pointer.dtype.element_ty), mask=mask)


@triton.jit
def walking_weight_gradient_kernel(
    grad_pointer,
    x_pointer,
    rstd_pointer,
    partial_pointer,
    n_rows,
    n_cols,
    grad_stride,
    x_stride,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One column tile of one partial row of dW, from every `num_programs(1)`-th block of rows."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_columns = columns < n_cols
    weight_grad = tl.zeros((ROWS, BLOCK), dtype=ACCUMULATOR)
    for first in range(tl.program_id(1).to(tl.int64) * ROWS, n_rows, tl.num_programs(1) * ROWS):
        rows = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = rows < n_rows
        mask = in_rows & in_columns
        value = tl.load(x_pointer + rows * x_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        grad = tl.load(grad_pointer + rows * grad_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        weight_grad += grad * (value * tl.load(rstd_pointer + rows, mask=in_rows, other=0.0))
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    partial_row = partial_pointer + tl.program_id(1).to(tl.int64) * n_cols
    tl.store(partial_row + at, tl.sum(weight_grad, axis=0), mask=at < n_cols)


@triton.jit
def column_sum_kernel(
    partial_pointer, sum_pointer, n_rows, n_cols, ACCUMULATOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of the partial rows, in a fixed order, for one tile of columns."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), dtype=ACCUMULATOR)
    for start in range(0, n_rows, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        mask = (rows < n_rows) & (columns < n_cols)
        total += tl.load(partial_pointer + rows * n_cols + columns, mask=mask, other=0.0)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sum_pointer + at, narrow(tl.sum(total, axis=0), sum_pointer.dtype.element_ty), mask=at < n_cols)


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """(normed, x + residual or None, 1 / rms of each row)."""
    dtype, device, n_cols, n_entries = x.dtype, x.device, weight.shape[0], x.numel()
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None if residual is None else torch.empty_like(normed)
    n_rows = n_entries // n_cols if n_entries else x.shape[:-1].numel()
    rstd = torch.empty(n_rows, dtype=accumulator_dtype(dtype), device=device)
    if n_entries:
        x, x_stride = rows_of(x, n_cols)
        residual, residual_stride = (x, x_stride) if residual is None else rows_of(residual, n_cols)
        walk = n_cols > WIDEST_TILE
        block = WALKING_TILE if walk else next_power_of_2(n_cols)
        bucket = "walk" if walk else str(block)
        chosen = configuration("rmsnorm_forward", device, dtype, bucket, partial(default_forward, block=block))
        launch(
            forward_kernel,
            (cdiv(n_rows, chosen["ROWS"]),),
            x,
            residual,
            weight.contiguous(),
            normed,
            normed if total is None else total,
            rstd,
            n_rows,
            n_cols,
            x_stride,
            residual_stride,
            eps,
            ACCUMULATOR=accumulator(dtype),
            ADD=total is not None,
            WALK=walk,
            BLOCK=block,
            **chosen.keywords,
        )
    return normed, total, rstd


def backward(grad: Tensor, total_grad: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dW); `x` is what was normalised, `total_grad` a gradient that reached it by the other way round the norm."""
    dtype, device, n_cols, n_entries = x.dtype, x.device, weight.shape[0], x.numel()
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not n_entries:
        return x_grad, torch.zeros(n_cols, dtype=weight.dtype, device=device)
    weight = weight.contiguous()
    weight_grad = torch.empty_like(weight)
    n_rows = n_entries // n_cols
    add = total_grad is not None
    grad, grad_stride = rows_of(grad, n_cols)
    extra, extra_stride = rows_of(total_grad, n_cols) if add else (grad, grad_stride)
    x, x_stride = rows_of(x, n_cols)
    sum_type = accumulator(dtype)
    multiprocessors = card(device).multiprocessors
    if n_cols <= WIDEST_BACKWARD_TILE:
        block = next_power_of_2(n_cols)
        chosen = configuration(
            "add_rmsnorm_backward" if add else "rmsnorm_backward",
            device,
            dtype,
            str(block),
            partial(default_backward, block=block, dtype=dtype, add=add),
            candidates=partial(backward_candidates, block=block, dtype=dtype, add=add),
        )
        rows, stages = chosen["ROWS"], chosen["STAGES"]
        programs = min(chosen["PROGRAMS"] * multiprocessors, cdiv(n_rows, rows))
        partial_sums = torch.empty(programs, n_cols, dtype=rstd.dtype, device=device)
        launch(
            backward_kernel,
            (programs,),
            grad,
            extra,
            x,
            weight,
            rstd,
            x_grad,
            partial_sums,
            n_rows,
            n_cols,
            grad_stride,
            extra_stride,
            x_stride,
            ACCUMULATOR=sum_type,
            ADD=add,
            KEEP_WEIGHT=block <= WIDEST_WITH_WEIGHT,
            STAGES=stages,
            ROWS=rows,
            BLOCK=block,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    else:
        launch(
            walking_input_gradient_kernel,
            (n_rows,),
            grad,
            extra,
            x,
            weight,
            rstd,
            x_grad,
            n_cols,
            grad_stride,
            extra_stride,
            x_stride,
            ACCUMULATOR=sum_type,
            ADD=add,
            BLOCK=WALKING_TILE,
            num_warps=8,
            num_stages=2,
        )
        rows, block = 4, 512
        tiles = cdiv(n_cols, block)
        programs = min(cdiv(16 * multiprocessors, tiles), cdiv(n_rows, rows))
        partial_sums = torch.empty(programs, n_cols, dtype=rstd.dtype, device=device)
        launch(
            walking_weight_gradient_kernel,
            (tiles, programs),
            grad,
            x,
            rstd,
            partial_sums,
            n_rows,
            n_cols,
            grad_stride,
            x_stride,
            ACCUMULATOR=sum_type,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
            num_stages=2,
        )
    launch(
        column_sum_kernel,
        (cdiv(n_cols, 32),),
        partial_sums,
        weight_grad,
        programs,
        n_cols,
        # 128 bytes of a row: more programs, each with fewer loads one after another, than wider tiles give.
        ACCUMULATOR=sum_type,
        ROWS=64,
        BLOCK=32,
        num_warps=4,
        num_stages=2,
    )
    return x_grad, weight_grad


def default_forward(card: Card, *, block: int) -> Configuration:
    """About 2048 entries a tile; 16 to 32 of them a thread."""
    rows = max(1, 2048 // block)
    return Configuration.of(num_warps=min(16, max(4, rows * block // 512)), ROWS=rows)


def default_backward(card: Card, *, block: int, dtype: torch.dtype, add: bool = False) -> Configuration:
    """About 4096 entries a tile, 16 of them a thread; few programs run, so each loads blocks of rows ahead.

    STAGES = n keeps n - 1 tiles of each operand in shared memory: of x, dy and, for add_rmsnorm, the residual's
    gradient. Registers let two programs of up to 8 warps share a multiprocessor, so both need room; of 16 warps on,
    PROGRAMS = 1 fills it. Rows of less than 1024 keep one tile: with two, float32 takes 172 registers, and only one
    program fits. 8192 bfloat16 entries by 8 warps are as many bytes on their way, fewer programs and half the
    reductions: 195 us against 210 at 32768 x 4096 on an H200; with a third operand they don't pay. The longest rows
    keep none: 200 us against 283 at 8192 x 16384.
    """
    rows = max(1, 4096 // block)
    num_warps = min(32, max(4, rows * block // 512))
    tile = block * dtype.itemsize
    if block == 4096 and not add and 2 * 2 * 2 * tile < card.shared_memory:
        return Configuration.of(num_warps=8, ROWS=2, STAGES=3, PROGRAMS=1)
    programs = 2 if num_warps <= 8 else 1
    if block > 8192:
        stages = 1
    elif block >= 1024 and programs * 2 * 3 * rows * tile < card.shared_memory:
        stages = 3
    else:
        stages = 2
    return Configuration.of(num_warps=num_warps, ROWS=rows, STAGES=stages, PROGRAMS=programs)


def backward_candidates(card: Card, *, block: int, dtype: torch.dtype, add: bool = False) -> tuple[Configuration, ...]:
    """The default with every depth of its pipeline, other numbers of warps, rows a tile and programs, and pairs of
    these that keep as many bytes on their way."""
    default = default_backward(card, block=block, dtype=dtype, add=add)
    num_warps, settled = default.num_warps, dict(default.constants)
    rows, programs = settled["ROWS"], settled["PROGRAMS"]
    changes = (
        *({"STAGES": depth} for depth in (1, 2, 3, 4)),
        *({"PROGRAMS": count} for count in (1, 2, 3, 4)),
        *({"STAGES": 1, "PROGRAMS": count} for count in (2, 3, 4)),
        *({"ROWS": tile} for tile in (max(1, rows // 2), rows * 2)),
        {"ROWS": rows * 2, "PROGRAMS": max(1, programs // 2)},
        {"ROWS": max(1, rows // 2), "PROGRAMS": programs * 2},
    )
    return (
        *(Configuration.of(num_warps, **{**settled, **change}) for change in changes),
        *(Configuration.of(warps, **settled) for warps in (num_warps // 2, min(32, num_warps * 2))),
    )


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        for n_rows, n_cols in ((8192, 768), (16384, 4096), (4096, 16384), (1024, 65536)):
            x, weight = meta(n_rows, n_cols, dtype=dtype), meta(n_cols, dtype=dtype)
            rstd = meta(n_rows)
            name = f"{dtype_name(dtype)}_{n_cols}"
            yield f"rmsnorm_forward_{name}", partial(forward, x, None, weight, 1e-5)
            yield f"rmsnorm_backward_{name}", partial(backward, x, None, x, weight, rstd)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, _, rstd = forward(x, None, weight, eps)
    return normed, rstd


def _fake_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=accumulator_dtype(x.dtype))


def _backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return backward(grad, None, x, weight, rstd)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_operator = operator("rmsnorm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", _forward, _fake_forward)
_backward_operator = operator(
    "rmsnorm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    # Otherwise autograd fills a tensor of zeros for rstd at every backward pass.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    x_grad, weight_grad = _backward_operator(grad, *ctx.saved_tensors)
    return x_grad, weight_grad, None


differentiable(_operator, _gradients, _setup_context)
