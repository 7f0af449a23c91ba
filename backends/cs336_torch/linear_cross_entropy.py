"""F.linear followed by F.cross_entropy: one matrix product by the vendor's library, one fused loss."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.linear_cross_entropy import check

from .cross_entropy import loss_of


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """See the contract. The logits are rounded to the dtype of `x` once, as the matrix product returns them."""
    check(x, weight, targets, reduction)
    return loss_of(torch.nn.functional.linear(x, weight), targets, reduction).to(x.dtype)
