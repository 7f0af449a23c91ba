"""Attention through `F.scaled_dot_product_attention`, which picks the fastest kernel the device has.

That operator takes a mask or causality, not both, and leaves open what a query without keys gets: both settled here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cs336_registry.components.attention import allowed_keys, check


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
    check(q, k, v, mask, is_causal, document_ids, scale)
    shape = (*q.shape[:-1], v.shape[-1])
    if mask is None and document_ids is None:
        return _four_dimensional(q, k, v, None, is_causal, scale).reshape(shape)
    allowed = allowed_keys(q, k, mask, is_causal, document_ids)
    allowed = allowed.expand(*(1,) * (q.ndim - allowed.ndim), *allowed.shape)
    # Without this, a row that allows nothing is NaN in some kernels: let it see every key, then erase its result.
    dead = ~allowed.any(dim=-1, keepdim=True)
    return _four_dimensional(q, k, v, allowed | dead, False, scale).reshape(shape).masked_fill(dead, 0.0)


def _four_dimensional(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """The fused kernels take (batch, heads, seq, d) only: other inputs are folded into that shape."""
    if q.ndim > 4 and allowed is not None:
        allowed = allowed.expand(*q.shape[:-3], *allowed.shape[-3:])
    q, k, v = (_fold(tensor) for tensor in (q, k, v))
    allowed = None if allowed is None else _fold(allowed)
    # A branch rather than `enable_gqa=k.shape[1] != q.shape[1]`, which is no bool while dynamic shapes are traced.
    if k.shape[1] == q.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=is_causal, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, allowed, is_causal=is_causal, scale=scale, enable_gqa=True)


def _fold(tensor: Tensor) -> Tensor:
    if tensor.ndim > 4:
        return tensor.flatten(0, -4)
    if tensor.ndim == 3:
        return tensor.unsqueeze(1)
    return tensor if tensor.ndim == 4 else tensor[None, None]
