"""The softmax, with the maximum subtracted so that no exponential overflows."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.softmax import check


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    check(x, dim)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    exponentials = torch.exp(wide - wide.amax(dim=dim, keepdim=True).detach())
    return (exponentials / exponentials.sum(dim=dim, keepdim=True)).to(x.dtype)
