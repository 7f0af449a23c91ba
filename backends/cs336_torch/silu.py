"""The sigmoid linear unit through `F.silu`, which computes in float32 and rounds once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cs336_registry.components.silu import check


def silu(x: Tensor) -> Tensor:
    check(x)
    return F.silu(x)
