"""Rotary position embedding of q and k in one launch; the backward pass is the same kernel with -sin.

A program takes a tile of positions, loads its cosines and sines once, and turns the same positions of several heads
(where positions differ from head to head, it loads them for each). Any strides are read as they are, since q and k are
usually transposed views, and results keep the memory order of q and k where that has no gaps. A position outside the
tables gives NaN, not a read out of bounds. Legend: B batch, H heads, S positions, D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cs336_registry.components.rope import align_positions, check

from .configurations import Configuration, configuration
from .operators import differentiable, operator, power_of_two_up_to
from .runtime import PRODUCTION_DTYPES, Card, accumulator, cdiv, dtype_name, launch, meta, narrow, next_power_of_2

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def rope(
    q: Float[Tensor, "*heads seq d_head"],
    k: Float[Tensor, "*kv_heads seq d_head"] | None,
    cos: Float[Tensor, "max_seq_len d_head/2"],
    sin: Float[Tensor, "max_seq_len d_head/2"],
    token_positions: Int[Tensor, "*leading seq"] | None = None,
) -> tuple[Float[Tensor, "*heads seq d_head"], Float[Tensor, "*kv_heads seq d_head"] | None]:
    """`(a cos - b sin, a sin + b cos)` for each pair of neighbouring features; see the contract."""
    check(q, k, cos, sin, token_positions)
    if k is not None and k.ndim == q.ndim and k.shape[:-3] == q.shape[:-3]:
        return _operator(q, k, cos, sin, token_positions)
    # One launch serves tensors that differ in heads alone.
    q_rotated, _ = _operator(q, None, cos, sin, token_positions)
    return q_rotated, None if k is None else _operator(k, None, cos, sin, token_positions)[0]


@triton.jit
def load_tables(
    cos_pointer,
    sin_pointer,
    position_pointer,
    position_stride,
    at,
    n_positions,
    n_pairs,
    max_seq_len,
    cos_stride,
    sin_stride,
    ACCUMULATOR: tl.constexpr,
    BACKWARD: tl.constexpr,
    GIVEN_POSITIONS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """(cos, sin) of a tile of positions; for the backward pass, of the opposite angles."""
    pairs = tl.arange(0, PAIRS)[None, :]
    position = at
    if GIVEN_POSITIONS:
        position = tl.load(position_pointer + at * position_stride, mask=at < n_positions, other=0).to(tl.int64)
    mask = (at < n_positions) & (pairs < n_pairs) & (position >= 0) & (position < max_seq_len)
    cos = tl.load(cos_pointer + position * cos_stride + pairs, mask=mask, other=float("nan")).to(ACCUMULATOR)
    sin = tl.load(sin_pointer + position * sin_stride + pairs, mask=mask, other=float("nan")).to(ACCUMULATOR)
    if BACKWARD:
        sin = -sin
    return cos, sin


@triton.jit
def rotate_heads(
    x_pointer,
    output_pointer,
    cos_pointer,
    sin_pointer,
    position_pointer,
    first_head,
    n_heads,
    at,
    n_positions,
    n_pairs,
    max_seq_len,
    x_stride_h,
    x_stride_s,
    output_stride_h,
    output_stride_s,
    cos_stride,
    sin_stride,
    position_stride_h,
    position_stride_s,
    ACCUMULATOR: tl.constexpr,
    BACKWARD: tl.constexpr,
    GIVEN_POSITIONS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Turn the positions `at` of `HEADS` heads from `first_head` on."""
    columns = tl.arange(0, 2 * PAIRS)[None, :]
    mask = (at < n_positions) & (columns < 2 * n_pairs)
    cos, sin = load_tables(
        cos_pointer,
        sin_pointer,
        position_pointer + first_head * position_stride_h,
        position_stride_s,
        at,
        n_positions,
        n_pairs,
        max_seq_len,
        cos_stride,
        sin_stride,
        ACCUMULATOR,
        BACKWARD,
        GIVEN_POSITIONS,
        PAIRS,
    )
    for head in range(first_head, tl.minimum(first_head + HEADS, n_heads)):
        if BY_HEAD:
            cos, sin = load_tables(
                cos_pointer,
                sin_pointer,
                position_pointer + head * position_stride_h,
                position_stride_s,
                at,
                n_positions,
                n_pairs,
                max_seq_len,
                cos_stride,
                sin_stride,
                ACCUMULATOR,
                BACKWARD,
                GIVEN_POSITIONS,
                PAIRS,
            )
        x = tl.load(x_pointer + head * x_stride_h + at * x_stride_s + columns, mask=mask, other=0.0).to(ACCUMULATOR)
        even, odd = tl.split(tl.reshape(x, (POSITIONS, PAIRS, 2)))
        turned = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (POSITIONS, 2 * PAIRS))
        output = output_pointer + head * output_stride_h + at * output_stride_s + columns
        tl.store(output, narrow(turned, output_pointer.dtype.element_ty), mask=mask)


@triton.jit
def rotation_kernel(
    q_pointer,
    k_pointer,
    q_output_pointer,
    k_output_pointer,
    cos_pointer,
    sin_pointer,
    position_pointer,
    n_positions,
    n_pairs,
    max_seq_len,
    q_heads,
    k_heads,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    q_output_stride_b,
    q_output_stride_h,
    q_output_stride_s,
    k_output_stride_b,
    k_output_stride_h,
    k_output_stride_s,
    cos_stride,
    sin_stride,
    position_stride_b,
    position_stride_h,
    position_stride_s,
    ACCUMULATOR: tl.constexpr,
    BACKWARD: tl.constexpr,
    GIVEN_POSITIONS: tl.constexpr,
    BY_HEAD: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Program (tile of positions of one batch entry, group of heads): the first groups are q's, the others k's."""
    tiles = tl.cdiv(n_positions, POSITIONS)
    batch = tl.program_id(0).to(tl.int64) // tiles
    at = (tl.program_id(0).to(tl.int64) % tiles) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    group = tl.program_id(1).to(tl.int64)
    q_groups = tl.cdiv(q_heads, HEADS)
    positions = position_pointer + batch * position_stride_b
    if group < q_groups:
        rotate_heads(
            q_pointer + batch * q_stride_b,
            q_output_pointer + batch * q_output_stride_b,
            cos_pointer,
            sin_pointer,
            positions,
            group * HEADS,
            q_heads,
            at,
            n_positions,
            n_pairs,
            max_seq_len,
            q_stride_h,
            q_stride_s,
            q_output_stride_h,
            q_output_stride_s,
            cos_stride,
            sin_stride,
            position_stride_h,
            position_stride_s,
            ACCUMULATOR,
            BACKWARD,
            GIVEN_POSITIONS,
            BY_HEAD,
            HEADS,
            POSITIONS,
            PAIRS,
        )
    else:
        rotate_heads(
            k_pointer + batch * k_stride_b,
            k_output_pointer + batch * k_output_stride_b,
            cos_pointer,
            sin_pointer,
            positions,
            (group - q_groups) * HEADS,
            k_heads,
            at,
            n_positions,
            n_pairs,
            max_seq_len,
            k_stride_h,
            k_stride_s,
            k_output_stride_h,
            k_output_stride_s,
            cos_stride,
            sin_stride,
            position_stride_h,
            position_stride_s,
            ACCUMULATOR,
            BACKWARD,
            GIVEN_POSITIONS,
            BY_HEAD,
            HEADS,
            POSITIONS,
            PAIRS,
        )


def rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, token_positions: Tensor | None, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """(q turned, k turned); without k the second is empty. q and k differ at most in heads."""
    q_output = _like(q)
    k_output = torch.empty(0, dtype=q.dtype, device=q.device) if k is None else _like(k)
    if not (q_output.numel() or k_output.numel()):
        return q_output, k_output
    q_view, (q_batch, q_head, q_position, _) = _batch_heads(q)
    q_output_view, (q_output_batch, q_output_head, q_output_position, _) = _batch_heads(q_output)
    k_view, k_output_view, k_heads = q_view, q_output_view, 0
    k_batch = k_head = k_position = k_output_batch = k_output_head = k_output_position = 0
    if k is not None:
        k_view, (k_batch, k_head, k_position, _) = _batch_heads(k)
        k_output_view, (k_output_batch, k_output_head, k_output_position, _) = _batch_heads(k_output)
        k_heads = k_view.shape[1]
    batch, q_heads, n_positions, d_head = q_view.shape
    cos, sin = _unit_stride(cos), _unit_stride(sin)
    positions, position_strides, by_head = cos, (0, 0, 0), False
    if token_positions is not None:
        positions = _batch_head_positions(token_positions, q)
        position_strides, by_head = positions.stride(), positions.shape[1] > 1
    pairs = next_power_of_2(d_head // 2)
    chosen = configuration("rope", q.device, q.dtype, f"d{2 * pairs}", default_tile)
    heads = chosen["HEADS"]
    tile = power_of_two_up_to(max(chosen["ENTRIES"] // (2 * pairs), 1), n_positions)
    launch(
        rotation_kernel,
        (cdiv(n_positions, tile) * batch, cdiv(q_heads, heads) + cdiv(k_heads, heads)),
        q_view,
        k_view,
        q_output_view,
        k_output_view,
        cos,
        sin,
        positions,
        n_positions,
        d_head // 2,
        cos.shape[0],
        q_heads,
        k_heads,
        q_batch,
        q_head,
        q_position,
        k_batch,
        k_head,
        k_position,
        q_output_batch,
        q_output_head,
        q_output_position,
        k_output_batch,
        k_output_head,
        k_output_position,
        cos.stride(0),
        sin.stride(0),
        *position_strides,
        ACCUMULATOR=accumulator(q.dtype),
        BACKWARD=backward,
        GIVEN_POSITIONS=token_positions is not None,
        BY_HEAD=by_head,
        HEADS=heads,
        POSITIONS=tile,
        PAIRS=pairs,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return q_output, k_output


def default_tile(card: Card) -> Configuration:
    """2048 entries a tile, 16 a thread; 4 heads share the loaded tables."""
    return Configuration.of(num_warps=4, ENTRIES=2048, HEADS=4)


def _like(x: Tensor) -> Tensor:
    """Uninitialised memory for a result: in the order of x where that has unit stride along D and nothing is folded."""
    if x.ndim <= 4:
        empty = torch.empty_like(x)
        if empty.stride()[-1] == 1:
            return empty
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _batch_heads(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x as (B, H, S, D) with unit stride along D, and its strides: a view, unless D is strided or more dimensions don't
    fold."""
    strides = x.stride()
    if len(strides) == 4 and strides[3] == 1:
        return x, strides
    x = _unit_stride(x)
    if x.ndim > 4:
        x = x.reshape(x.shape[:-3].numel(), *x.shape[-3:])
    while x.ndim < 4:
        x = x.unsqueeze(0)
    return x, x.stride()


def _batch_head_positions(token_positions: Tensor, x: Tensor) -> Tensor:
    """The positions as (B, H or 1, S): stride 0 where they are shared."""
    positions = align_positions(token_positions, x)
    while positions.ndim < max(x.ndim - 1, 3):
        positions = positions.unsqueeze(0)
    *_, heads, seq = positions.shape
    batch = x.shape[:-3]
    positions = positions.expand(*batch, heads, seq) if batch else positions
    positions = positions.reshape(batch.numel(), heads, seq) if len(batch) > 1 else positions
    if heads == 1:
        # A head dimension of 1 may have any stride: all heads share it.
        positions = positions.as_strided(positions.shape, (positions.stride(0), 0, positions.stride(2)))
    return positions


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        for d_head in (64, 128):
            q = meta(4, 4096, 32, d_head, dtype=dtype).transpose(1, 2)
            k = meta(4, 4096, 8, d_head, dtype=dtype).transpose(1, 2)
            cos = meta(8192, d_head // 2)
            for name, positions in (("counted", None), ("given", meta(4, 4096, dtype=torch.int64))):
                for backward in (False, True):
                    label = f"rope_{'backward' if backward else 'forward'}_{dtype_name(dtype)}_d{d_head}_{name}"
                    yield label, partial(rotate, q, k, cos, cos, positions, backward=backward)


def _fake_rotate(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, token_positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(0) if k is None else _like(k)


_SIGNATURE = "(Tensor q, Tensor? k, Tensor cos, Tensor sin, Tensor? token_positions) -> (Tensor, Tensor)"
_operator = operator(f"rope{_SIGNATURE}", rotate, _fake_rotate)
_backward_operator = operator(f"rope_backward{_SIGNATURE}", partial(rotate, backward=True), _fake_rotate)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, k, cos, sin, token_positions = inputs
    ctx.save_for_backward(cos, sin, token_positions)
    ctx.has_k = k is not None
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, q_grad: Tensor | None, k_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """A result that nobody used has no gradient, and neither has the k that wasn't given."""
    if q_grad is not None and ctx.has_k and k_grad is not None:
        return (*_backward_operator(q_grad, k_grad, *ctx.saved_tensors), None, None, None)
    if q_grad is not None:
        return _backward_operator(q_grad, None, *ctx.saved_tensors)[0], None, None, None, None
    if k_grad is not None and ctx.has_k:
        return None, _backward_operator(k_grad, None, *ctx.saved_tensors)[0], None, None, None
    return None, None, None, None, None


differentiable(_operator, _gradients, _setup_context)
