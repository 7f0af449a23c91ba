"""Gradient clipping by the global norm: one norm over all gradients, one factor for all of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cs336_registry.components.gradient_clipping import check, gradients_of


@torch.no_grad()
def gradient_clipping(parameters: Iterable[Tensor] | Tensor, max_l2_norm: float, *, eps: float = 1e-6) -> Tensor:
    """See the contract. The factor stays a tensor, so nothing waits for the device."""
    check(max_l2_norm, eps)
    gradients = gradients_of(parameters)
    if not gradients:
        return torch.zeros(())
    wide = torch.float32
    for gradient in gradients:
        wide = torch.promote_types(wide, gradient.dtype)
    device = gradients[0].device
    squares = [gradient.to(wide).square().sum().to(device) for gradient in gradients]
    norm = torch.stack(squares).sum().sqrt()
    factor = torch.where(norm > max_l2_norm, max_l2_norm / (norm + eps), 1.0)
    for gradient in gradients:
        gradient.copy_(gradient.to(wide) * factor.to(gradient.device))
    return norm
