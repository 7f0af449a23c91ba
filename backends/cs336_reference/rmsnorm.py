"""Root mean square normalisation, as its paper writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.rmsnorm import check


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    check(x, weight, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    root_mean_square = torch.sqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide / root_mean_square * weight).to(x.dtype)
