"""Rotary position embedding: each pair of features is turned by its position's angle."""

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
    seq = x.shape[-2]
    rows = slice(seq) if token_positions is None else align_positions(token_positions, x)
    cos, sin = cos[rows], sin[rows]  # (..., seq, d_head / 2)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide[..., 0::2], wide[..., 1::2]
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
