"""Scaled dot-product attention by its definition: all scores are held in memory."""

from __future__ import annotations

import math

import torch
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
    dtype = q.dtype
    q, k, v = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (q, k, v))
    if q.ndim >= 4 and k.shape[-3] != q.shape[-3]:
        heads_per_group = q.shape[-3] // k.shape[-3]
        k, v = (tensor.repeat_interleave(heads_per_group, dim=-3) for tensor in (k, v))
    scores = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    allowed = allowed_keys(q, k, mask, is_causal, document_ids)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return (masked_softmax(scores) @ v).to(dtype)


def masked_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension in which a row of nothing but -inf becomes 0 instead of NaN."""
    largest = scores.amax(dim=-1, keepdim=True).detach()
    exponentials = torch.exp(scores - largest.masked_fill(largest == -math.inf, 0.0))
    total = exponentials.sum(dim=-1, keepdim=True)
    return exponentials / total.masked_fill(total == 0.0, 1.0)
