"""Embedding lookup, and a backward pass without atomics: bitwise repeatable.

Backward sorts the token ids (stable, so that equal ids keep their order). A program then takes one token: it adds the
gradients of its run of places in float32 and writes the sum, or zeros, so that nothing is zeroed before. In a text some
tokens occur thousands of times: what a run has of whole chunks of 32 places, and of whole chunks of 32 such chunks, is
added before, by as many programs, and the token's program adds their sums. Chunks begin at fixed places, so the order
of additions depends on the ids alone.
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
    next_power_of_2,
    rows_of,
)

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
def key_kernel(token_pointer, key_pointer, n_tokens, vocab, BLOCK: tl.constexpr):
    """What is sorted: the ids in fewer bytes, which take fewer passes, and `vocab` for those outside the vocabulary."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < n_tokens
    tokens = tl.load(token_pointer + places, mask=mask, other=0).to(tl.int64)
    keys = tl.where((tokens >= 0) & (tokens < vocab), tokens, vocab)
    tl.store(key_pointer + places, keys.to(key_pointer.dtype.element_ty), mask=mask)


@triton.jit
def first_place_kernel(key_pointer, first_pointer, n_tokens, vocab, n_steps, BLOCK: tl.constexpr):
    """Where each token's run begins in the sorted keys, found by bisection; first[vocab] ends the last run."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), dtype=tl.int64)
    high = low + n_tokens
    for _ in range(n_steps):
        middle = (low + high) // 2
        smaller = tl.load(key_pointer + middle, mask=low < high, other=0).to(tl.int64) < tokens
        smaller = smaller & (low < high)
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    tl.store(first_pointer + tokens, low, mask=tokens <= vocab)


@triton.jit
def add_rows(
    total,
    row_pointer,
    order_pointer,
    row_stride,
    lanes,
    n_cols,
    first,
    end,
    ORDERED: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """`total` and the rows that stand at first ... end - 1 (of the order, if ORDERED), UNROLL of them read at once."""
    for start in range(first, end, UNROLL):
        for step in tl.static_range(UNROLL):
            row = start + step
            in_run = row < end
            if ORDERED:
                row = tl.load(order_pointer + row, mask=in_run, other=0)
            mask = (lanes < n_cols) & in_run
            total += tl.load(row_pointer + row * row_stride + lanes, mask=mask, other=0.0).to(total.dtype)
    return total


@triton.jit
def embedding_chunk_kernel(
    row_pointer,
    order_pointer,
    key_pointer,
    sum_pointer,
    n_cols,
    row_stride,
    ACCUMULATOR: tl.constexpr,
    ORDERED: tl.constexpr,
    PLACES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of CHUNK rows, which stand for PLACES places, if these are all one token's; otherwise nobody asks."""
    chunk = tl.program_id(0).to(tl.int64)
    keys = key_pointer + chunk * PLACES
    if tl.load(keys) == tl.load(keys + PLACES - 1):
        rows = chunk * CHUNK + tl.arange(0, CHUNK)[:, None]
        if ORDERED:
            rows = tl.load(order_pointer + rows)
        at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        lanes = at[None, :]
        values = tl.load(row_pointer + rows * row_stride + lanes, mask=lanes < n_cols, other=0.0).to(ACCUMULATOR)
        tl.store(sum_pointer + chunk * n_cols + at, tl.sum(values, axis=0), mask=at < n_cols)


@triton.jit
def embedding_backward_kernel(
    grad_pointer,
    order_pointer,
    first_pointer,
    sum_pointer,
    outer_pointer,
    weight_grad_pointer,
    n_cols,
    grad_stride,
    ACCUMULATOR: tl.constexpr,
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token's row of dW, or a tile of it: the places before its whole chunks, the chunks, the places after them."""
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(first_pointer + token)
    end = tl.load(first_pointer + token + 1)
    # What begins within the run, and ends there.
    chunk = (first + CHUNK - 1) // CHUNK
    chunk_end = end // CHUNK
    has_chunks = chunk < chunk_end
    head_end = tl.where(has_chunks, chunk * CHUNK, end)
    total = tl.zeros((BLOCK,), dtype=ACCUMULATOR)
    total = add_rows(total, grad_pointer, order_pointer, grad_stride, lanes, n_cols, first, head_end, True, UNROLL)
    if has_chunks:
        outer = (chunk + CHUNK - 1) // CHUNK
        outer_end = tl.maximum(chunk_end // CHUNK, outer)
        before = tl.minimum(outer * CHUNK, chunk_end)
        after = outer_end * CHUNK
        tail = chunk_end * CHUNK
        total = add_rows(total, sum_pointer, order_pointer, n_cols, lanes, n_cols, chunk, before, False, UNROLL)
        total = add_rows(total, outer_pointer, order_pointer, n_cols, lanes, n_cols, outer, outer_end, False, UNROLL)
        total = add_rows(total, sum_pointer, order_pointer, n_cols, lanes, n_cols, after, chunk_end, False, UNROLL)
        total = add_rows(total, grad_pointer, order_pointer, grad_stride, lanes, n_cols, tail, end, True, UNROLL)
    output = weight_grad_pointer + token * n_cols + lanes
    tl.store(output, narrow(total, weight_grad_pointer.dtype.element_ty), mask=lanes < n_cols)


CHUNK = 32
"""Places whose gradients one program adds for a long run, and partial sums that one program adds for a longer one."""


def default_forward(card: Card) -> Configuration:
    return Configuration.of(num_warps=4, ENTRIES=2048)


def default_backward(card: Card, *, block: int) -> Configuration:
    """A row in one program, 16 entries a thread, and no more than two rows read at once: most tokens occur once or not
    at all, and what counts is how many programs fit a multiprocessor, 6 of 4096 bfloat16 entries. 32768 distinct tokens
    took 141 us so on an H200, 158 us in tiles of 1024; tiles of several rows, most of whose warps have nothing to read,
    took up to 4.8 ms."""
    return Configuration.of(num_warps=max(1, min(block, 4096) // 512), WIDTH=4096, UNROLL=2)


def backward_candidates(card: Card, *, block: int) -> tuple[Configuration, ...]:
    return tuple(
        Configuration.of(num_warps=max(1, min(block, width) // entries), WIDTH=width, UNROLL=unroll)
        for width in (4096, 1024)
        for entries in (512, 1024, 256)
        for unroll in (2, 1, 4)
    )


def default_chunk(card: Card) -> Configuration:
    """64 entries a thread, all of them rows that are wanted; each warp reads whole lines of 256 columns."""
    return Configuration.of(num_warps=4, WIDTH=256)


def forward(token_ids: Tensor, weight: Tensor) -> Tensor:
    vocab, n_cols = weight.shape
    dtype, device, n_tokens = weight.dtype, weight.device, token_ids.numel()
    output = torch.empty(*token_ids.shape, n_cols, dtype=dtype, device=device)
    if not output.numel():
        return output
    weight, weight_stride = rows_of(weight, n_cols)
    chosen = configuration("embedding_forward", device, dtype, "any", default_forward)
    entries = chosen["ENTRIES"]
    block = power_of_two_up_to(entries, n_cols)
    rows = power_of_two_up_to(entries // block, n_tokens)
    launch(
        forward_kernel,
        (cdiv(n_tokens, rows) * cdiv(n_cols, block),),
        token_ids.contiguous(),
        weight,
        output,
        n_tokens,
        vocab,
        n_cols,
        weight_stride,
        ROWS=rows,
        BLOCK=block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return output


def backward(grad: Tensor, token_ids: Tensor, weight: Tensor) -> Tensor:
    vocab, n_cols = weight.shape
    n_tokens, dtype, device = token_ids.numel(), grad.dtype, grad.device
    if not grad.numel():
        return torch.zeros(vocab, n_cols, dtype=weight.dtype, device=device)
    weight_grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    wide, sum_type = accumulator_dtype(dtype), accumulator(dtype)
    rows, row_stride = rows_of(grad, n_cols)
    key_dtype = torch.int16 if vocab < 2**15 else torch.int32 if vocab < 2**31 else torch.int64
    keys = torch.empty(n_tokens, dtype=key_dtype, device=device)
    token_ids = token_ids.contiguous()
    launch(key_kernel, (cdiv(n_tokens, 1024),), token_ids, keys, n_tokens, vocab, BLOCK=1024, num_warps=4, num_stages=2)
    keys, order = torch.sort(keys, stable=True)
    first = torch.empty(vocab + 1, dtype=torch.int64, device=device)
    launch(
        first_place_kernel,
        (cdiv(vocab + 1, 128),),
        keys,
        first,
        n_tokens,
        vocab,
        n_tokens.bit_length(),
        BLOCK=128,
        num_warps=4,
        num_stages=2,
    )
    widest = next_power_of_2(n_cols)
    chosen = configuration("embedding_chunk", device, dtype, "any", default_chunk)
    block = min(chosen["WIDTH"], widest)
    chunks = n_tokens // CHUNK
    sums = torch.empty(chunks, n_cols, dtype=wide, device=device)
    outer_sums = torch.empty(chunks // CHUNK, n_cols, dtype=wide, device=device)
    for source, stride, target, places in ((rows, row_stride, sums, CHUNK), (sums, n_cols, outer_sums, CHUNK * CHUNK)):
        launch(
            embedding_chunk_kernel,
            (n_tokens // places, cdiv(n_cols, block)),
            source,
            order,
            keys,
            target,
            n_cols,
            stride,
            ACCUMULATOR=sum_type,
            ORDERED=source is rows,
            PLACES=places,
            CHUNK=CHUNK,
            BLOCK=block,
            num_warps=chosen.num_warps,
            num_stages=chosen.num_stages,
        )
    chosen = configuration(
        "embedding_backward",
        device,
        dtype,
        str(widest),
        partial(default_backward, block=widest),
        candidates=partial(backward_candidates, block=widest),
    )
    block = min(chosen["WIDTH"], widest)
    launch(
        embedding_backward_kernel,
        (vocab, cdiv(n_cols, block)),
        rows,
        order,
        first,
        sums,
        outer_sums,
        weight_grad,
        n_cols,
        row_stride,
        ACCUMULATOR=sum_type,
        CHUNK=CHUNK,
        UNROLL=chosen["UNROLL"],
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
