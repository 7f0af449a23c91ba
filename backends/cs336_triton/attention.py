"""Scaled dot-product attention without the score matrix: FlashAttention-2 forward and backward in Triton.

`attention_kernels.py` holds the kernels; on H100 and H200 those of `attention_hopper.py` come first. This file prepares
their arguments: any leading dimensions become (batch, heads), masks and document ids are passed as strided views and
never expanded in memory, and the results take the memory layout of q, k and v, so that merging heads afterwards is
free.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cs336_registry.components.attention import check

from . import attention_hopper
from . import attention_kernels as kernels
from .configurations import Configuration, configuration
from .operators import differentiable, operator
from .runtime import (
    PRODUCTION_DTYPES,
    Card,
    accumulator,
    accumulator_dtype,
    allow_scratch_memory,
    card,
    cdiv,
    dtype_name,
    launch,
    meta,
    next_power_of_2,
)

LARGEST_HEAD = 256
LONGEST_TILE = 1024
"""Rows of the longest tile that any configuration has: that of delta, over 16 features."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """FlashAttention-2: one pass over the keys per tile of queries, recomputed in the backward pass from the LSE.

    Memory beyond the result is one float32 per query; the backward pass takes two more, and on H100 and H200 with 128
    features a workspace of at most 1 GiB for the gradients of scores. Runs are bitwise repeatable. Head dimensions up
    to 256; sizes that are not powers of two are padded inside the kernel. float32 products are IEEE, not TF32.
    """
    check(q, k, v, mask, is_causal, document_ids, scale)
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        raise ValueError(
            f"attention: head dimension {max(q.shape[-1], v.shape[-1])} exceeds {LARGEST_HEAD}, the largest of the "
            f"Triton kernels: choose another backend for attention (attention=torch)"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    shape = (*q.shape[:-1], v.shape[-1])
    if mask is not None:
        mask = _four_dimensional_mask(mask, q.shape[:-2], q.shape[-2], k.shape[-2])
    if document_ids is not None:
        batch = q.shape[:-3] if q.ndim >= 4 else q.shape[:-2]
        document_ids = document_ids.expand(*batch, -1).reshape(-1, q.shape[-2])
    q, k, v = _four_dimensional(q), _four_dimensional(k), _four_dimensional(v)
    output, _, _ = attention_forward(q, k, v, mask, document_ids, is_causal, scale)
    return output if output.ndim == len(shape) else output.reshape(shape)


class FlashAttention2(torch.autograd.Function):
    """The course's `torch.autograd.Function`: q, k, v of shape (batch, sequence, d) and a causal flag.

    Saves q, k, v, the output and exactly one (batch, queries) tensor, the log-sum-exp of each query's scores.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        scale = 1.0 / math.sqrt(q.shape[-1])
        output, lse, statistics = attention_forward(
            q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), None, None, is_causal, scale
        )
        output, lse = output.squeeze(1), lse.squeeze(1)
        ctx.save_for_backward(q, k, v, output, lse, statistics)
        ctx.is_causal = is_causal
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        *tensors, statistics = ctx.saved_tensors
        tensors = [tensor.unsqueeze(1) for tensor in (grads[0], *tensors)]
        scale = 1.0 / math.sqrt(tensors[0].shape[-1])
        gradients = attention_backward(*tensors, statistics, None, None, ctx.is_causal, scale)
        grad_q, grad_k, grad_v = (gradient.squeeze(1) for gradient in gradients)
        return grad_q, grad_k, grad_v, None


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_output(q, v), *_empty_statistics(q)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, want_q: bool = True, want_kv: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(q, k, v, want_q, want_kv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, mask, document_ids, is_causal, scale = inputs
    ctx.save_for_backward(q, k, v, *output, mask, document_ids)
    ctx.is_causal, ctx.scale = is_causal, scale
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    want_q, want_k, want_v = ctx.needs_input_grad[:3]
    gradients = attention_backward(
        grad, *ctx.saved_tensors, ctx.is_causal, ctx.scale, want_q=want_q, want_kv=want_k or want_v
    )
    wanted = zip(gradients, (want_q, want_k, want_v), strict=True)
    return (*(gradient if want else None for gradient, want in wanted), None, None, None, None)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, document_ids: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q (batch, heads, queries, d), k and v (batch, kv_heads, keys, d) to the output, the LSE and its two parts."""
    output = _empty_output(q, v)
    lse, statistics = _empty_statistics(q)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    q, k, v = _readable(q), _readable(k), _readable(v)
    if mask is None and document_ids is None and attention_hopper.serves(q, k, v, scale):
        attention_hopper.forward(q, k, v, output, lse, is_causal, scale)
        return output, lse, statistics
    masks, mask_strides = _mask_arguments(mask, document_ids, q.dtype)
    constants = _constants(q, k, v, mask, document_ids, is_causal)

    def run(chosen: Configuration) -> None:
        blocks = cdiv(queries, chosen["BLOCK_M"]) * batch * heads
        launch(
            kernels.attention_forward_kernel,
            (min(blocks, card(q.device).multiprocessors) if chosen["PERSISTENT"] else blocks,),
            *(q, k, v, output, lse, statistics, *masks),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *output.stride()[:3], *mask_strides,
            *(batch, heads, queries, keys, scale * math.log2(math.e)),
            **constants,
            **_described(chosen, k, v),
        )  # fmt: skip

    run(_choose("attention_forward", q, v, mask, document_ids, is_causal, run))
    return output, lse, statistics


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    statistics: Tensor,
    mask: Tensor | None,
    document_ids: Tensor | None,
    is_causal: bool,
    scale: float,
    *,
    want_q: bool = True,
    want_kv: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each in the layout of what it is the gradient of; empty where not wanted."""
    grad_q, grad_k, grad_v = _empty_gradients(q, k, v, want_q, want_kv)
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    grad, q, k, v, output = (_readable(x) for x in (grad, q, k, v, output))
    if mask is None and document_ids is None and attention_hopper.serves_backward(grad, q, k, v):
        written = (grad_q, grad_k, grad_v)
        attention_hopper.backward(
            grad, q, k, v, output, lse, *written, is_causal, scale, want_q=want_q, want_kv=want_kv
        )
        return _exact_gradients(*written, keys)
    delta = torch.empty_like(lse)
    masks, mask_strides = _mask_arguments(mask, document_ids, q.dtype)
    constants = _constants(q, k, v, mask, document_ids, is_causal)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    factor = scale * math.log2(math.e)

    def run_delta(chosen: Configuration) -> None:
        launch(
            kernels.attention_delta_kernel,
            (cdiv(queries, chosen["BLOCK_M"]) * batch * heads,),
            *(output, grad, delta, *output.stride()[:3], *grad.stride()[:3], heads, queries),
            **{name: constants[name] for name in ("VALUE_D", "BLOCK_V", "ACCUMULATOR")},
            **chosen.keywords,
        )

    def run_queries(chosen: Configuration) -> None:
        launch(
            kernels.attention_query_gradient_kernel,
            (cdiv(queries, chosen["BLOCK_M"]) * batch * heads,),
            *(q, k, v, grad, lse, statistics, delta, grad_q, *masks),
            *(*strides, *grad_q.stride()[:3], *mask_strides, heads, queries, keys, scale, factor),
            **constants,
            **_described(chosen, k, v),
        )

    def run_keys(chosen: Configuration) -> None:
        launch(
            kernels.attention_key_gradient_kernel,
            (cdiv(keys, chosen["BLOCK_N"]) * batch * kv_heads,),
            *(q, k, v, grad, lse, statistics, delta, grad_k, grad_v, *masks),
            *(*strides, *grad_k.stride()[:3], *grad_v.stride()[:3], *mask_strides),
            *(kv_heads, queries, keys, scale, factor),
            EVEN_QUERIES=queries % chosen["BLOCK_M"] == 0,
            **constants,
            **_described(chosen, q, grad),
        )

    for kernel, run, wanted in (
        ("attention_delta", run_delta, True),
        ("attention_query_gradient", run_queries, want_q),
        ("attention_key_gradient", run_keys, want_kv),
    ):
        if wanted:
            run(_choose(kernel, q, v, mask, document_ids, is_causal, run))
    return _exact_gradients(grad_q, grad_k, grad_v, keys)


def _exact_gradients(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax over one key is constant. The kernels' dP - delta leaves a rounding error where this is exact."""
    if keys == 1:
        grad_q.zero_()
        grad_k.zero_()
    return grad_q, grad_k, grad_v


attention_forward = operator(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? document_ids, bool is_causal, float scale)"
    " -> (Tensor output, Tensor lse, Tensor statistics)",
    forward,
    _fake_forward,
)
attention_backward = operator(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse, Tensor statistics,"
    " Tensor? mask, Tensor? document_ids, bool is_causal, float scale, *, bool want_q=True, bool want_kv=True)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    backward,
    _fake_backward,
)
differentiable(attention_forward, _gradients, _save)


def _mask_arguments(
    mask: Tensor | None, document_ids: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """The mask and the document ids as the kernels take them: two pointers or None, and six strides."""
    if mask is not None:
        mask = mask.view(torch.uint8)
    if dtype == torch.float64:
        # Triton doesn't compile a float64 product of something that depends on narrow integers.
        mask = None if mask is None else _widened(mask)
        document_ids = None if document_ids is None else document_ids.long()
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    document_strides = (0, 0) if document_ids is None else document_ids.stride()
    return [mask, document_ids], (*mask_strides, *document_strides)


def _widened(mask: Tensor) -> Tensor:
    """The mask as int32, a copy of what it holds: where it is broadcast it stays so."""
    held = mask[tuple(slice(None if stride else 1) for stride in mask.stride())]
    return held.to(torch.int32).expand(mask.shape)


def _constants(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, document_ids: Tensor | None, is_causal: bool
) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // max(k.shape[1], 1),
        "D": q.shape[3],
        "VALUE_D": v.shape[3],
        "BLOCK_D": _padded(q.shape[3]),
        "BLOCK_V": _padded(v.shape[3]),
        "IS_CAUSAL": is_causal,
        "HAS_MASK": mask is not None,
        "HAS_DOCUMENTS": document_ids is not None,
        "ACCUMULATOR": accumulator(q.dtype),
        "PRECISE": q.dtype.itemsize > 2,
    }


def _padded(width: int) -> int:
    """Tensor cores multiply at least 16 columns, and tiles are powers of two."""
    return max(16, next_power_of_2(width))


def _four_dimensional(x: Tensor) -> Tensor:
    """(..., heads, sequence, d) as (batch, heads, sequence, d); 2-D and 3-D inputs have no heads."""
    if x.ndim == 4:
        return x
    if x.ndim <= 3:
        return x.reshape(-1, 1, *x.shape[-2:])
    return x.reshape(x.shape[:-3].numel(), *x.shape[-3:])


def _four_dimensional_mask(mask: Tensor, leading: torch.Size, queries: int, keys: int) -> Tensor:
    """The mask as a (batch, heads, queries, keys) view with zero strides where it is broadcast.

    Only several leading dimensions of which some are broadcast need a copy, without broadcast heads, queries or keys.
    """
    if len(leading) <= 1:
        mask = mask.expand(*mask.shape[:-2], queries, keys) if mask.ndim >= 2 else mask.expand(queries, keys)
        return mask.expand(*leading, queries, keys).reshape(-1, 1, queries, keys)
    heads = leading[-1]
    padded = mask[(None,) * max(0, 3 - mask.ndim)]
    batched = padded.expand(*leading[:-1], *padded.shape[-3:])
    if len(leading) > 2:
        batched = batched.reshape(leading[:-1].numel(), *padded.shape[-3:])
    return batched.expand(-1, heads, queries, keys)


def _readable(x: Tensor) -> Tensor:
    """`x` itself where its rows are contiguous and a tile's offsets fit int32; otherwise a contiguous copy."""
    return x if _close(x) and (x.stride(3) == 1 or x.shape[3] == 1) else x.contiguous()


def _close(x: Tensor) -> bool:
    """Whether int32 holds the offsets within a tile of rows of `x`."""
    return x.stride(2) * LONGEST_TILE < 2**31


def _described(chosen: Configuration, *walked: Tensor) -> dict[str, Any]:
    """The keywords of `chosen`, with pointers in place of descriptors where a tensor that is walked has none."""
    if not chosen["DESCRIPTORS"]:
        return chosen.keywords
    allow_scratch_memory()
    return {**chosen.keywords, "DESCRIPTORS": all(_describable(x) for x in walked)}


def _describable(x: Tensor) -> bool:
    """Whether the copy engine can fetch tiles of `x`: starts and rows at multiples of 16 bytes."""
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    return aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0


def _empty_rows(x: Tensor) -> Tensor:
    """An empty tensor in the memory layout of `x`, if its rows are contiguous in that layout, and close."""
    empty = torch.empty_like(x)
    kept = empty.stride(3) == 1 and _close(empty)
    return empty if kept else torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, want_q: bool, want_kv: bool) -> tuple[Tensor, Tensor, Tensor]:
    wanted = zip((q, k, v), (want_q, want_kv, want_kv), strict=True)
    grad_q, grad_k, grad_v = (_empty_rows(x) if want else x.new_empty(0) for x, want in wanted)
    return grad_q, grad_k, grad_v


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    if q.shape[3] == v.shape[3]:
        return _empty_rows(q)
    return torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)


def _empty_statistics(q: Tensor) -> tuple[Tensor, Tensor]:
    """The LSE (batch, heads, queries), and its two parts beside each other, (0, 2) where half precision needs none."""
    dtype = accumulator_dtype(q.dtype)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    if q.dtype.itemsize <= 2:
        return lse, q.new_empty((0, 2), dtype=dtype)
    return lse, torch.empty((*q.shape[:3], 2), dtype=dtype, device=q.device)


def _choose(
    kernel: str,
    q: Tensor,
    v: Tensor,
    mask: Tensor | None,
    document_ids: Tensor | None,
    is_causal: bool,
    run: Callable[[Configuration], None],
) -> Configuration:
    width = max(_padded(q.shape[3]), _padded(v.shape[3]))
    masked = mask is not None
    edge = "_masked" if masked else "" if document_ids is None else "_documents"
    bucket = f"d{width}{edge}" + ("_causal" if is_causal else "")
    return configuration(
        kernel,
        q.device,
        q.dtype,
        bucket,
        partial(default_configuration, kernel, q.dtype, width, q.shape[2], masked=masked),
        candidates=partial(candidate_configurations, kernel, q.dtype, width, masked=masked),
        run=run,
    )


def default_configuration(
    kernel: str, dtype: torch.dtype, width: int, queries: int, card: Card, *, masked: bool = False
) -> Configuration:
    """What is used where no table was measured: the first candidate, whose tiles compile without spilling."""
    if kernel == "attention_delta":
        return Configuration.of(num_warps=4, num_stages=1, BLOCK_M=max(16, 8192 // width))
    if card.capability == (0, 0):
        # The interpreter: time goes by the number of tiles, but odd lengths must cross edges, so unequal sizes.
        blocks = (64, 32) if queries <= 128 else (128, 64)
        blocks = blocks if kernel != "attention_key_gradient" else blocks[::-1]
        return Configuration.of(BLOCK_M=blocks[0], BLOCK_N=blocks[1], **_plain(kernel))
    return candidate_configurations(kernel, dtype, width, card, masked=masked)[0]


def candidate_configurations(
    kernel: str, dtype: torch.dtype, width: int, card: Card, *, masked: bool = False
) -> tuple[Configuration, ...]:
    """Every configuration worth timing, the untimed favourite first: (BLOCK_M, BLOCK_N, num_warps, num_stages)."""
    if kernel == "attention_delta":
        return tuple(
            Configuration.of(num_warps=num_warps, num_stages=1, BLOCK_M=max(16, tile // width))
            for tile in (8192, 4096, 16384)
            for num_warps in (4, 8)
        )
    return tuple(
        Configuration.of(num_warps=num_warps, num_stages=num_stages, BLOCK_M=m, BLOCK_N=n, **variant)
        for variant in _variants(kernel, dtype, card)
        for m, n, num_warps, num_stages in _tiles(kernel, dtype, width, card, masked)
    )


def _plain(kernel: str) -> dict[str, bool]:
    """Pointers, one block per program, every warp doing the same."""
    forward_only = {"PERSISTENT": False} if kernel == "attention_forward" else {}
    return {"DESCRIPTORS": False, "WARP_SPECIALIZE": False, **forward_only}


def _variants(kernel: str, dtype: torch.dtype, card: Card) -> tuple[dict[str, bool], ...]:
    """The plain kernel first; from Hopper on, what the copy engine and a persistent grid may add to it."""
    plain = _plain(kernel)
    if dtype.itemsize > 2 or card.capability < (9, 0):
        return (plain,)
    # Not WARP_SPECIALIZE: Triton 3.7 compiles it to the same code on Hopper and does not compile it for Blackwell.
    described = {**plain, "DESCRIPTORS": True}
    if kernel != "attention_forward":
        return plain, described
    return plain, described, {**plain, "PERSISTENT": True}, {**described, "PERSISTENT": True}


def _tiles(
    kernel: str, dtype: torch.dtype, width: int, card: Card, masked: bool
) -> tuple[tuple[int, int, int, int], ...]:
    """(BLOCK_M, BLOCK_N, num_warps, num_stages), read off the compiler: they fit the card, the first unspilled.

    float32 is multiplied without tensor cores, in unrolled products: small tiles, or the compiler takes minutes.
    """
    if dtype.itemsize > 2:
        return _FLOAT32_TILES[kernel][_bracket(width)]
    tiles = (_HALF_TILES_HOPPER if card.capability >= (9, 0) else _HALF_TILES)[kernel][_bracket(width)]
    if masked and width <= 64:
        tiles = tuple(dict.fromkeys((*_MASKED_TILES.get(kernel, ()), *tiles)))
    return tiles


def _bracket(width: int) -> int:
    return next(bracket for bracket in (64, 128, 256) if width <= bracket)


# Rows of a mask that don't start at multiples of 16 bytes are read byte by byte, and every byte's address takes two
# registers: tiles of 128 x 128 spill 1.3 to 2 kB a thread in the forward kernel and 0.6 kB in that of dQ.
_MASKED_TILES = {
    "attention_forward": ((64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
    "attention_query_gradient": ((64, 64, 4, 2),),
}
_HALF_TILES_HOPPER = {
    "attention_forward": {
        64: ((128, 128, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2)),
        256: ((128, 64, 8, 2), (128, 32, 8, 2)),
    },
    "attention_query_gradient": {
        64: ((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)),
        256: ((64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
    },
    "attention_key_gradient": {
        64: ((64, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 3), (32, 128, 8, 3)),
        # With 64 x 128 products are wider, but registers spill: in Triton 3.7.1 24 bytes a thread through descriptors
        # and 96 through pointers, in Triton 3.6 8 and 16.
        128: ((32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3)),
        256: ((16, 64, 8, 2), (32, 32, 8, 1)),
    },
}
_HALF_TILES = {
    "attention_forward": {
        64: ((128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
        128: ((128, 64, 8, 2), (128, 32, 4, 3), (64, 64, 4, 2)),
        256: ((64, 32, 8, 2), (64, 64, 8, 1)),
    },
    "attention_query_gradient": {
        64: ((64, 64, 4, 2), (128, 64, 8, 2)),
        128: ((64, 64, 8, 2), (64, 32, 4, 2)),
        256: ((64, 32, 8, 1), (32, 32, 8, 1)),
    },
    "attention_key_gradient": {
        64: ((64, 64, 4, 2), (64, 128, 8, 2)),
        128: ((32, 64, 8, 2), (32, 64, 4, 2)),
        256: ((32, 32, 8, 1), (16, 32, 8, 1)),
    },
}
_FLOAT32_TILES = {
    "attention_forward": {64: ((64, 32, 8, 2),), 128: ((32, 16, 8, 1), (32, 32, 8, 1)), 256: ((16, 32, 8, 1),)},
    "attention_query_gradient": {64: ((64, 32, 8, 2), (32, 32, 4, 2)), 128: ((16, 32, 8, 1),), 256: ((16, 16, 8, 1),)},
    "attention_key_gradient": {64: ((32, 32, 8, 2),), 128: ((16, 32, 8, 1),), 256: ((16, 16, 8, 1),)},
}


def _forward_backward(
    batch: int, heads: int, kv_heads: int, length: int, d: int, dtype: torch.dtype, is_causal: bool, masking: str = ""
) -> None:
    q, output_grad = meta(batch, heads, length, d, dtype=dtype), meta(batch, heads, length, d, dtype=dtype)
    k, v = meta(batch, kv_heads, length, d, dtype=dtype), meta(batch, kv_heads, length, d, dtype=dtype)
    mask = meta(1, 1, length, length, dtype=torch.bool).expand(batch, heads, -1, -1) if masking == "mask" else None
    document_ids = meta(batch, length, dtype=torch.int64) if masking == "documents" else None
    saved = forward(q, k, v, mask, document_ids, is_causal, d**-0.5)
    backward(output_grad, q, k, v, *saved, mask, document_ids, is_causal, d**-0.5)


def production_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Causal, full, masked, packed and grouped attention at the head sizes in use; see `runtime`."""
    for dtype in PRODUCTION_DTYPES:
        for d in (64, 128):
            for is_causal in (False, True):
                label = f"{dtype_name(dtype)}_d{d}_{'causal' if is_causal else 'full'}"
                yield label, partial(_forward_backward, 2, 16, 16, 4096, d, dtype, is_causal)
    for d in (64, 128):
        yield f"bfloat16_d{d}_grouped", partial(_forward_backward, 2, 32, 8, 4096, d, torch.bfloat16, True)
        yield f"bfloat16_d{d}_odd", partial(_forward_backward, 2, 16, 16, 4001, d, torch.bfloat16, True)
        for masking in ("mask", "documents"):
            call = partial(_forward_backward, 2, 16, 16, 4096, d, torch.bfloat16, masking == "documents", masking)
            yield f"bfloat16_d{d}_{masking}", call
    for is_causal in (False, True):
        # Too long for the gradients of scores to be saved.
        label = f"bfloat16_d128_long_{'causal' if is_causal else 'full'}"
        yield label, partial(_forward_backward, 1, 2, 2, 65536, 128, torch.bfloat16, is_causal)
    yield "bfloat16_d64_short", partial(_forward_backward, 16, 12, 12, 1024, 64, torch.bfloat16, True)
    yield "bfloat16_d64_mask_odd", partial(_forward_backward, 2, 16, 16, 4001, 64, torch.bfloat16, False, "mask")
    for d in (32, 80, 256):
        yield f"bfloat16_d{d}_causal", partial(_forward_backward, 2, 8, 8, 4096, d, torch.bfloat16, True)
