"""The output projection followed by cross entropy: the logits are made, and kept for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.linear_cross_entropy import check

from .cross_entropy import cross_entropy


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """See the contract. Both factors are widened first, so that the logits are float32."""
    check(x, weight, targets, reduction)
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(wide) @ weight.to(wide).T
    return cross_entropy(logits, targets, reduction=reduction).to(x.dtype)
