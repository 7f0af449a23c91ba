"""Rotary position embedding with one fused multiply-add per half of a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.rope import align_positions, check


def rope(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, token_positions: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    check(q, k, cos, sin, token_positions)
    return rotate(q, cos, sin, token_positions), None if k is None else rotate(k, cos, sin, token_positions)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, token_positions: Tensor | None) -> Tensor:
    rows = slice(x.shape[-2]) if token_positions is None else align_positions(token_positions, x)
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[rows].to(wide), sin[rows].to(wide)
    first, second = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
