"""Embedding lookup, and a backward pass without atomics: bitwise repeatable.

Backward sorts the token ids (stable, so that equal ids keep their order) and gives each run of equal ids to the program
at its start, which adds the run's gradients in float32 and writes the sum once. Programs within a run leave at once.
An id outside the vocabulary gives a row of NaN and no gradient, not an access out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cs336_registry.components.embedding import check

from .configurations import Configuration, configuration
from .operators import differentiable, operator, power_of_two_up_to
from .runtime import PRODUCTION_DTYPES, Card, accumulator, cdiv, contiguous_rows, dtype_name, launch, meta, narrow

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def embedding(
    token_ids: Int[Tensor, "*shape"], weight: Float[Tensor, "vocab_size d_model"]
) -> Float[Tensor, "*shape d_model"]:
    """`weight[token_ids]`, with a deterministic gradient; see the contract."""
    check(token_ids, weight)
    return _operator(token_ids, weight)


@triton.jit
def forward_kernel(
    token_pointer,
    weight_pointer,
    output_pointer,
    n_tokens,
    vocab,
    n_cols,
    weight_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(n_cols, BLOCK)
    rows = (tl.program_id(0).to(tl.int64) // tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (tl.program_id(0).to(tl.int64) % tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < n_tokens) & (columns < n_cols)
    tokens = tl.load(token_pointer + rows, mask=rows < n_tokens, other=0).to(tl.int64)
    readable = mask & (tokens >= 0) & (tokens < vocab)
    values = tl.load(weight_pointer + tokens * weight_stride + columns, mask=readable, other=float("nan"))
    tl.store(output_pointer + rows * n_cols + columns, values, mask=mask)


@triton.jit
def backward_kernel(
    grad_pointer,
    sorted_pointer,
    order_pointer,
    weight_grad_pointer,
    n_tokens,
    vocab,
    n_cols,
    grad_stride,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of dW of the token whose run starts at this program's place, for one tile of columns."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    token = tl.load(sorted_pointer + place).to(tl.int64)
    before = tl.load(sorted_pointer + place - 1, mask=place > 0, other=-1).to(tl.int64)
    if (token != before) & (token >= 0) & (token < vocab):
        total = tl.zeros((ROWS, BLOCK), dtype=ACCUMULATOR)
        run_length = tl.full((), ROWS, dtype=tl.int32)
        start = place
        while run_length == ROWS:
            places = start + tl.arange(0, ROWS)[:, None]
            in_tokens = places < n_tokens
            in_run = tl.load(sorted_pointer + places, mask=in_tokens, other=-1).to(tl.int64) == token
            rows = tl.load(order_pointer + places, mask=in_run, other=0).to(tl.int64)
            mask = in_run & (columns < n_cols)
            total += tl.load(grad_pointer + rows * grad_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
            run_length = tl.sum(in_run.to(tl.int32))
            start += ROWS
        at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        output = narrow(tl.sum(total, axis=0), weight_grad_pointer.dtype.element_ty)
        tl.store(weight_grad_pointer + token * n_cols + at, output, mask=at < n_cols)


WIDE = 1024


def default_backward(card: Card, *, wide: bool) -> Configuration:
    """32 entries a thread. A wide tile, where there are as many columns: most programs find no run, or a short one."""
    return backward_tiles(card, wide=wide)[0]


def backward_tiles(card: Card, *, wide: bool) -> tuple[Configuration, ...]:
    """More rows at once help a long run, whose rows are added one tile after another; more columns all the others."""
    tiles = (
        ((8, 8192, WIDE), (8, 16384, WIDE), (8, 4096, WIDE), (4, 4096, WIDE), (16, 16384, WIDE), (8, 8192, 512))
        if wide
        else ((4, 4096, 256), (4, 2048, 256), (8, 8192, 256), (4, 4096, 512), (8, 8192, 512), (4, 4096, 128))
    )
    return tuple(Configuration.of(warps, ENTRIES=entries, WIDTH=width) for warps, entries, width in tiles)


def default_forward(card: Card) -> Configuration:
    return Configuration.of(num_warps=4, ENTRIES=2048)


def forward(token_ids: Tensor, weight: Tensor) -> Tensor:
    output = torch.empty(*token_ids.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
    if not output.numel():
        return output
    weight = contiguous_rows(weight)
    vocab, n_cols = weight.shape
    chosen = configuration("embedding_forward", weight.device, weight.dtype, "any", default_forward)
    block = power_of_two_up_to(chosen["ENTRIES"], n_cols)
    rows = power_of_two_up_to(chosen["ENTRIES"] // block, token_ids.numel())
    launch(
        forward_kernel,
        (cdiv(token_ids.numel(), rows) * cdiv(n_cols, block),),
        token_ids.contiguous(),
        weight,
        output,
        token_ids.numel(),
        vocab,
        n_cols,
        weight.stride(0),
        ROWS=rows,
        BLOCK=block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return output


def backward(grad: Tensor, token_ids: Tensor, weight: Tensor) -> Tensor:
    weight_grad = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    if not grad.numel():
        return weight_grad
    rows = contiguous_rows(grad)
    n_tokens, n_cols = rows.shape
    in_order, order = torch.sort(token_ids.reshape(-1), stable=True)
    wide = n_cols >= WIDE
    chosen = configuration(
        "embedding_backward",
        grad.device,
        grad.dtype,
        "wide" if wide else "narrow",
        partial(default_backward, wide=wide),
        candidates=partial(backward_tiles, wide=wide),
    )
    block = power_of_two_up_to(chosen["WIDTH"], n_cols)
    launch(
        backward_kernel,
        (n_tokens, cdiv(n_cols, block)),
        rows,
        in_order,
        order,
        weight_grad,
        n_tokens,
        weight.shape[0],
        n_cols,
        rows.stride(0),
        ACCUMULATOR=accumulator(grad.dtype),
        ROWS=min(max(chosen["ENTRIES"] // block, 1), 64),
        BLOCK=block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return weight_grad


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        for vocab, d_model in ((50257, 768), (128256, 4096)):
            tokens, weight = meta(32768, dtype=torch.int64), meta(vocab, d_model, dtype=dtype)
            name = f"{dtype_name(dtype)}_{d_model}"
            yield f"embedding_forward_{name}", partial(forward, tokens, weight)
            yield (
                f"embedding_backward_{name}",
                partial(backward, meta(32768, d_model, dtype=dtype), tokens, weight),
            )


_operator = operator(
    "embedding(Tensor token_ids, Tensor weight) -> Tensor",
    forward,
    lambda token_ids, weight: weight.new_empty(*token_ids.shape, weight.shape[1]),
)
_backward_operator = operator(
    "embedding_backward(Tensor grad, Tensor token_ids, Tensor weight) -> Tensor",
    backward,
    lambda grad, token_ids, weight: weight.new_empty(weight.shape),
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
    return None, _backward_operator(grad, *ctx.saved_tensors)


differentiable(_operator, _gradients, _setup_context)
