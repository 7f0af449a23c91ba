"""Root mean square normalisation through `F.rms_norm`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cs336_registry.components.rmsnorm import check


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    check(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps).to(x.dtype)
