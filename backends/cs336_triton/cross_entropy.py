"""Cross entropy in three passes over the logits: one read forward, one read and one write backward.

Forward keeps the largest logit and the log of the sum of each row, apart, because their sum would round away what large
logits leave of it; backward computes `(softmax - one hot) * grad_output` from them, into memory of its own: logits and
grad_output are never written. The running maximum and sum are kept per lane of the tile, so that
the lanes meet once a row. A target outside the vocabulary gives a loss and a gradient of NaN, not a read out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import triton
import triton.language as tl

from cs336_registry.components.cross_entropy import check

from .configurations import Configuration, configuration
from .operators import differentiable, operator, power_of_two_up_to, scalar
from .runtime import (
    PRODUCTION_DTYPES,
    Card,
    accumulator,
    accumulator_dtype,
    cdiv,
    dtype_name,
    launch,
    meta,
    narrow,
    rows_of,
)
from .softmax import LOG2_E, exp_difference

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def cross_entropy(
    logits: Float[Tensor, "*leading vocab"],
    targets: Int[Tensor, "*leading"],
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "*leading"]:
    """`log(sum(exp(logits))) - logits[target]` in one pass, its gradient in one more; see the contract."""
    check(logits, targets, reduction)
    return _operator(logits, targets, reduction)[0]


@triton.jit
def with_tile(highest, total, logits):
    """(maximum, sum of exponentials) of every lane, of which `logits` holds the next entries along its last axis."""
    higher = tl.maximum(highest, tl.max(logits, axis=1))
    total = total * exp_difference(highest, higher) + tl.sum(exp_difference(logits, higher[:, None]), axis=1)
    return higher, total


@triton.jit
def highest_and_log_sum(
    logits_row,
    n_cols,
    n_readable,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr = 1,
):
    """(max(row), log(sum(exp(row - max(row))))), in one pass; their sum is the log-sum-exp.

    A lane takes WIDTH neighbours at once, so that it corrects its running sum once for all of them: one exponential an
    entry and not two, which would take longer than reading it. `n_readable` entries may be read, of which the first
    `n_cols` count: a multiple of 16 lets a thread read 16 bytes. Only the last tile is masked: every instruction an
    entry counts, since they take nearly as long as the memory.
    """
    lanes = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    highest = tl.full((BLOCK // WIDTH,), -float("inf"), dtype=ACCUMULATOR)
    total = tl.zeros((BLOCK // WIDTH,), dtype=ACCUMULATOR)
    full = (n_cols // BLOCK) * BLOCK
    for start in tl.range(0, full, BLOCK, num_stages=STAGES):
        logits = tl.load(logits_row + start + lanes).to(ACCUMULATOR)
        highest, total = with_tile(highest, total, logits)
    if full < n_cols:
        columns = full + lanes
        logits = tl.load(logits_row + columns, mask=columns < n_readable, other=0.0).to(ACCUMULATOR)
        highest, total = with_tile(highest, total, tl.where(columns < n_cols, logits, -float("inf")))
    row_highest = tl.max(highest, axis=0)
    return row_highest, tl.log(tl.sum(total * exp_difference(highest, row_highest), axis=0))


@triton.jit
def target_logit(logits_row, target, n_cols, ACCUMULATOR: tl.constexpr):
    """The row's entry at `target`; NaN for a target outside the row."""
    inside = (target >= 0) & (target < n_cols)
    return tl.load(logits_row + target, mask=inside, other=float("nan")).to(ACCUMULATOR)


@triton.jit
def probability(logits, highest, log_sum):
    """exp(logits - highest - log_sum). The difference of what may be large comes first, and is exact near the top."""
    return tl.exp2((logits - highest) * LOG2_E - log_sum * LOG2_E)


@triton.jit
def forward_kernel(
    logits_pointer,
    target_pointer,
    loss_pointer,
    statistics_pointer,
    n_rows,
    n_cols,
    logits_stride,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_pointer + row * logits_stride
    highest, log_sum = highest_and_log_sum(logits_row, n_cols, n_cols, ACCUMULATOR, BLOCK, WIDTH, STAGES)
    target = tl.load(target_pointer + row).to(tl.int64)
    loss = log_sum + (highest - target_logit(logits_row, target, n_cols, ACCUMULATOR))
    tl.store(statistics_pointer + row, highest)
    tl.store(statistics_pointer + n_rows + row, log_sum)
    tl.store(loss_pointer + row, narrow(loss, loss_pointer.dtype.element_ty))


@triton.jit
def backward_kernel(
    logits_pointer,
    target_pointer,
    statistics_pointer,
    grad_pointer,
    logits_grad_pointer,
    n_rows,
    n_cols,
    logits_stride,
    grad_stride,
    scale: tl.float64,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(softmax - one hot) * grad * scale for one tile of one row."""
    tiles = tl.cdiv(n_cols, BLOCK)
    row = tl.program_id(0).to(tl.int64) // tiles
    start = (tl.program_id(0).to(tl.int64) % tiles) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < n_cols - start
    target = tl.load(target_pointer + row).to(tl.int64)
    highest = tl.load(statistics_pointer + row)
    log_sum = tl.load(statistics_pointer + n_rows + row)
    logits = tl.load(logits_pointer + row * logits_stride + start + lanes, mask=mask, other=0.0).to(ACCUMULATOR)
    grad = tl.load(grad_pointer + row * grad_stride).to(ACCUMULATOR) * scalar(scale, ACCUMULATOR)
    grad = tl.where((target >= 0) & (target < n_cols), grad, float("nan"))
    logits_grad = probability(logits, highest, log_sum)
    # Compared where it is, instead of for every entry.
    if (target >= start) & (target < start + BLOCK):
        logits_grad = tl.where(lanes == (target - start).to(tl.int32), logits_grad - 1.0, logits_grad)
    output = logits_grad_pointer + row * n_cols + start + lanes
    tl.store(output, narrow(logits_grad * grad, logits_grad_pointer.dtype.element_ty), mask=mask)


def lane_width(block: int, dtype: torch.dtype) -> int:
    """Neighbours that a lane takes at once: 16 bytes of them."""
    return min(16 // dtype.itemsize, block)


def default_forward(card: Card) -> Configuration:
    """16 entries a thread: 124 us at 8192 x 32768 on an H200, the best of tiles from 1024 to 8192 entries."""
    return Configuration.of(num_warps=4, TILE=2048, STAGES=1)


def default_backward(card: Card) -> Configuration:
    """As forward: 254 us at 8192 x 32768 on an H200, against 261 with twice the warps and entries."""
    return Configuration.of(num_warps=4, TILE=2048)


def forward(logits: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, (largest logit, log of the sum) of each row). The rows' losses are reduced in float32 and rounded once."""
    dtype, device = logits.dtype, logits.device
    wide = accumulator_dtype(dtype)
    n_rows, n_cols = targets.numel(), logits.shape[-1]
    statistics = torch.empty(2, n_rows, dtype=wide, device=device)
    losses_dtype = dtype if reduction == "none" else wide
    losses = torch.empty(targets.shape, dtype=losses_dtype, device=device)
    if n_rows:
        rows, row_stride = rows_of(logits, n_cols)
        chosen = configuration("cross_entropy_forward", device, dtype, "any", default_forward)
        block = power_of_two_up_to(chosen["TILE"], n_cols)
        launch(
            forward_kernel,
            (n_rows,),
            rows,
            targets.contiguous(),
            losses,
            statistics,
            n_rows,
            n_cols,
            row_stride,
            ACCUMULATOR=accumulator(dtype),
            BLOCK=block,
            WIDTH=lane_width(block, dtype),
            STAGES=chosen["STAGES"],
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    if reduction == "none":
        return losses, statistics
    loss = reduce_losses(losses, reduction)
    return loss if dtype is wide else loss.to(dtype), statistics


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def backward(grad: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, reduction: str) -> Tensor:
    dtype, device = logits.dtype, logits.device
    logits_grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if not logits.numel():
        return logits_grad
    n_rows, n_cols = targets.numel(), logits.shape[-1]
    rows, row_stride = rows_of(logits, n_cols)
    chosen = configuration("cross_entropy_backward", device, dtype, "any", default_backward)
    block = power_of_two_up_to(chosen["TILE"], n_cols)
    launch(
        backward_kernel,
        (n_rows * cdiv(n_cols, block),),
        rows,
        targets.contiguous(),
        statistics,
        grad.contiguous(),
        logits_grad,
        n_rows,
        n_cols,
        row_stride,
        1 if reduction == "none" else 0,
        1.0 / n_rows if reduction == "mean" else 1.0,
        ACCUMULATOR=accumulator(dtype),
        BLOCK=block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return logits_grad


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        for vocab in (32000, 50257, 128256):
            logits, targets = meta(8192, vocab, dtype=dtype), meta(8192, dtype=torch.int64)
            name = f"{dtype_name(dtype)}_{vocab}"
            yield f"cross_entropy_forward_{name}", partial(forward, logits, targets, "none")
            yield (
                f"cross_entropy_backward_{name}",
                partial(backward, meta(dtype=dtype), logits, targets, meta(2, 8192), "mean"),
            )


def _fake_forward(logits: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    loss = logits.new_empty(targets.shape if reduction == "none" else ())
    return loss, logits.new_empty((2, targets.numel()), dtype=accumulator_dtype(logits.dtype))


def _fake_backward(grad: Tensor, logits: Tensor, targets: Tensor, statistics: Tensor, reduction: str) -> Tensor:
    return logits.new_empty(logits.shape)


_operator = operator(
    "cross_entropy(Tensor logits, Tensor targets, str reduction) -> (Tensor, Tensor)", forward, _fake_forward
)
_backward_operator = operator(
    "cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor statistics, str reduction) -> Tensor",
    backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    logits, targets, ctx.reduction = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.mark_non_differentiable(output[1])
    # Otherwise autograd fills a tensor of zeros for the statistics at every backward pass.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    return _backward_operator(grad, *ctx.saved_tensors, ctx.reduction), None, None


differentiable(_operator, _gradients, _setup_context)
