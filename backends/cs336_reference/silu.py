"""The sigmoid linear unit, as its paper writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.silu import check


def silu(x: Tensor) -> Tensor:
    check(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(wide)).to(x.dtype)
