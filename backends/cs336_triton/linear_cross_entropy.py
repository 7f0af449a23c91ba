"""The output projection and its cross entropy together: the logits exist for one chunk of rows at a time.

Per chunk: logits by cuBLAS, then one kernel that computes the loss and writes `softmax - one hot` over the logits in
their own buffer, then dx and dW by cuBLAS. dW is summed over the chunks in float32. Nothing is filtered or estimated,
nothing waits for the device, and shapes alone decide what is allocated.

With reduction "mean" and "sum" the gradient of every row has the same factor, so that forward computes dx and dW up to
it (three matrix products in all, none repeated) and backward multiplies once. With "none" the factors are known only in
the backward pass, which computes the logits again: a fourth product.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import triton
import triton.language as tl

from cs336_registry.components.linear_cross_entropy import check

from .configurations import Configuration, configuration
from .cross_entropy import highest_and_log_sum, lane_width, reduce_losses, target_logit
from .operators import differentiable, operator, power_of_two_up_to, scalar
from .runtime import (
    PRODUCTION_DTYPES,
    Card,
    accumulator,
    accumulator_dtype,
    cdiv,
    contiguous_rows,
    dtype_name,
    launch,
    meta,
    narrow,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

CHUNK_BYTES = 2**30
FEWEST_CHUNK_ROWS, MOST_CHUNK_ROWS = 1024, 4096
"""Enough rows for full matrix products; more would only cost memory."""


def linear_cross_entropy(
    x: Float[Tensor, "*leading d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "*leading"],
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Float[Tensor, ""] | Float[Tensor, "*leading"]:
    """`cross_entropy(x @ weight.T, targets)` without keeping the logits; see the contract."""
    check(x, weight, targets, reduction)
    return _operator(x, weight, targets, reduction, *_wanted(x, weight))[0]


def _wanted(x: Tensor, weight: Tensor) -> tuple[bool, bool]:
    grad = torch.is_grad_enabled()
    return grad and x.requires_grad, grad and weight.requires_grad


@triton.jit
def loss_kernel(
    logits_pointer,
    target_pointer,
    loss_pointer,
    grad_pointer,
    n_cols,
    logits_stride,
    ACCUMULATOR: tl.constexpr,
    WRITE_LOSS: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
    GIVEN_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row: its loss, then `(softmax - one hot) [* grad]` over its logits.

    The second read comes from the cache where the rows at work fit it. 8 programs of 8 warps on each of a Hopper's 132
    multiprocessors hold 1056 rows: 34 MB at 16,000 bfloat16 entries, and 270 MB at 128,256, which are read again.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_pointer + row * logits_stride
    highest, log_sum = highest_and_log_sum(logits_row, n_cols, logits_stride, ACCUMULATOR, BLOCK, WIDTH)
    target = tl.load(target_pointer + row).to(tl.int64)
    if WRITE_LOSS:
        loss = log_sum + (highest - target_logit(logits_row, target, n_cols, ACCUMULATOR))
        tl.store(loss_pointer + row, narrow(loss, loss_pointer.dtype.element_ty))
    if WRITE_GRADIENT:
        # The target's logit must have been read by every thread before one of them overwrites it.
        tl.debug_barrier()
        grad = tl.where((target >= 0) & (target < n_cols), 1.0, float("nan")).to(ACCUMULATOR)
        if GIVEN_GRAD:
            grad *= tl.load(grad_pointer + row).to(ACCUMULATOR)
        for start in range(0, n_cols, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < logits_stride
            logits = tl.load(logits_row + columns, mask=mask, other=0.0).to(ACCUMULATOR)
            # Beyond the vocabulary the gradient is 0: a product reads it there, beside words of weight 0.
            logits = tl.where(columns < n_cols, logits, -float("inf"))
            logits_grad = (tl.exp(logits - highest - log_sum) - tl.where(columns == target, 1.0, 0.0)) * grad
            tl.store(logits_row + columns, narrow(logits_grad, logits_pointer.dtype.element_ty), mask=mask)


@triton.jit
def scale_kernel(
    value_pointer,
    factor_pointer,
    output_pointer,
    n_entries,
    scale: tl.float64,
    ACCUMULATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """output = value * factor * scale; the factor stays on the device."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n_entries
    factor = tl.load(factor_pointer).to(ACCUMULATOR) * scalar(scale, ACCUMULATOR)
    value = tl.load(value_pointer + at, mask=mask, other=0.0).to(ACCUMULATOR)
    tl.store(output_pointer + at, narrow(value * factor, output_pointer.dtype.element_ty), mask=mask)


def chunk_rows(n_rows: int, vocab: int, itemsize: int) -> int:
    """Rows of logits that are alive at once: about a gibibyte of them, in equal chunks of a multiple of 128 rows."""
    most = min(max(CHUNK_BYTES // (vocab * itemsize), FEWEST_CHUNK_ROWS), MOST_CHUNK_ROWS)
    chunks = cdiv(max(n_rows, 1), most)
    return cdiv(cdiv(max(n_rows, 1), chunks), 128) * 128


def default_loss(card: Card) -> Configuration:
    return Configuration.of(num_warps=8, TILE=4096)


def walk_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    losses: Tensor | None,
    grad: Tensor | None,
    want_x: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Fill `losses`; return (dx, dW in float32), empty where not wanted, with each row's `grad` as factor (None: 1)."""
    x, targets = contiguous_rows(x), targets.reshape(-1).contiguous()
    n_rows, vocab = x.shape[0], weight.shape[0]
    wide = accumulator_dtype(x.dtype)
    x_grad = torch.empty(x.shape if want_x else 0, dtype=x.dtype, device=x.device)
    rows = chunk_rows(n_rows, vocab, x.element_size())
    # A vocabulary of 50,257 is padded with words of weight 0: for sizes that are no multiple of 8, cuBLAS has only
    # products of an older design, which took five times as long.
    stride = cdiv(vocab, 16) * 16
    if stride != vocab:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, stride - vocab))
    weight_grad = torch.empty(weight.shape if want_weight else 0, dtype=wide, device=x.device)
    if want_weight and not (n_rows and weight.shape[1]):
        weight_grad.zero_()
    logits_buffer = torch.empty(min(rows, n_rows), stride, dtype=x.dtype, device=x.device)
    chosen = configuration("linear_cross_entropy", x.device, x.dtype, "any", default_loss)
    block = power_of_two_up_to(chosen["TILE"], vocab)
    for first in range(0, n_rows, rows):
        chunk = slice(first, min(first + rows, n_rows))
        x_chunk = x[chunk]
        logits = logits_buffer[: x_chunk.shape[0]]
        torch.mm(x_chunk, weight.t(), out=logits)
        launch(
            loss_kernel,
            (x_chunk.shape[0],),
            logits,
            targets[chunk],
            logits if losses is None else losses[chunk],
            logits if grad is None else grad[chunk],
            vocab,
            stride,
            ACCUMULATOR=accumulator(x.dtype),
            WRITE_LOSS=losses is not None,
            WRITE_GRADIENT=want_x or want_weight,
            GIVEN_GRAD=grad is not None,
            BLOCK=block,
            WIDTH=lane_width(block, x.dtype),
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
        if want_x:
            torch.mm(logits, weight, out=x_grad[chunk])
        if want_weight:
            _accumulate(weight_grad, logits.t(), x_chunk, first == 0)
    return x_grad, weight_grad[:vocab]


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total = a @ b, or total += a @ b after the first chunk; narrow operands, a wide sum."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif not a.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)
    elif _adds_to_float32(a.device):
        # cuBLAS multiplies bfloat16 and adds to float32 itself.
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


@cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether this PyTorch adds a product of bfloat16 matrices to a float32 one; some versions want one dtype."""
    product = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.addmm(product.float(), product, product, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, dx, dW in float32), gradients up to the loss's own and 1 / rows; empty where they come later or never."""
    now = reduction != "none"
    losses = torch.empty(targets.numel(), dtype=accumulator_dtype(x.dtype) if now else x.dtype, device=x.device)
    x_grad, weight_grad = walk_chunks(
        x, weight, targets, losses=losses, grad=None, want_x=want_x and now, want_weight=want_weight and now
    )
    loss = reduce_losses(losses, reduction).to(x.dtype)
    return loss.reshape(targets.shape) if reduction == "none" else loss, x_grad, weight_grad


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, targets: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dW) where every row has its own gradient: the logits are computed again."""
    x_grad, weight_grad = walk_chunks(
        x, weight, targets, losses=None, grad=grad.reshape(-1).contiguous(), want_x=want_x, want_weight=want_weight
    )
    return x_grad.reshape(x.shape) if want_x else x_grad, weight_grad.to(weight.dtype)


def scaled(value: Tensor, factor: Tensor, scale: float, like: Tensor) -> Tensor:
    """value * factor * scale in the shape and dtype of `like`."""
    output = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    launch(
        scale_kernel,
        (cdiv(value.numel(), 2048),),
        value,
        factor,
        output,
        value.numel(),
        scale,
        ACCUMULATOR=accumulator(like.dtype),
        BLOCK=2048,
        num_warps=4,
        num_stages=2,
    )
    return output


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        targets = meta(4096, dtype=torch.int64)
        x, weight = meta(4096, 4096, dtype=dtype), meta(128256, 4096, dtype=dtype)
        name = dtype_name(dtype)
        odd = meta(50257, 4096, dtype=dtype)
        yield f"linear_cross_entropy_odd_{name}", partial(forward, x, odd, targets, "mean", True, False)
        yield f"linear_cross_entropy_mean_{name}", partial(forward, x, weight, targets, "mean", True, False)
        yield f"linear_cross_entropy_loss_{name}", partial(forward, x, weight, targets, "none", False, False)
        yield (
            f"linear_cross_entropy_none_{name}",
            partial(backward, meta(4096, dtype=dtype), x, weight, targets, True, False),
        )
        yield f"linear_cross_entropy_scale_{name}", partial(scaled, meta(128256, 4096), meta(dtype=dtype), 1.0, weight)


def _fake_forward(
    x: Tensor, weight: Tensor, targets: Tensor, reduction: str, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    now = reduction != "none"
    return (
        x.new_empty(() if now else targets.shape),
        x.new_empty((targets.numel(), x.shape[-1]) if want_x and now else 0),
        weight.new_empty(weight.shape if want_weight and now else 0, dtype=accumulator_dtype(x.dtype)),
    )


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, targets: Tensor, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if want_x else 0), weight.new_empty(weight.shape if want_weight else 0)


_operator = operator(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, str reduction, bool want_x, bool want_weight)"
    " -> (Tensor, Tensor, Tensor)",
    forward,
    _fake_forward,
)
_backward_operator = operator(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor targets, bool want_x, bool want_weight)"
    " -> (Tensor, Tensor)",
    backward,
    _fake_backward,
)
_scaled_operator = operator(
    "linear_cross_entropy_scaled(Tensor value, Tensor factor, float scale, Tensor like) -> Tensor",
    scaled,
    lambda value, factor, scale, like: like.new_empty(like.shape),
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, targets, ctx.reduction, *ctx.wanted = inputs
    _, x_grad, weight_grad = output
    ctx.save_for_backward(x, weight, targets, x_grad, weight_grad)
    ctx.mark_non_differentiable(x_grad, weight_grad)
    # Otherwise autograd fills zeros in the shapes of dx and dW at every backward pass: gibibytes of them.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, weight, targets, x_grad, weight_grad = ctx.saved_tensors
    want_x, want_weight = ctx.wanted
    if ctx.reduction == "none":
        x_grad, weight_grad = _backward_operator(grad, x, weight, targets, want_x, want_weight)
    else:
        scale = 1.0 / max(targets.numel(), 1) if ctx.reduction == "mean" else 1.0
        x_grad = _scaled_operator(x_grad, grad, scale, x) if want_x else None
        weight_grad = _scaled_operator(weight_grad, grad, scale, weight) if want_weight else None
    return x_grad if want_x else None, weight_grad if want_weight else None, None, None, None, None


differentiable(_operator, _gradients, _setup_context)
