"""Gradient clipping with PyTorch's multi-tensor norm and product: a few launches, however many gradients there are.

`torch.nn.utils.clip_grad_norm_` is built on the same two, but fixes eps, takes the norm of bfloat16 gradients in
bfloat16 and scales gradients that are just below the limit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from cs336_registry.components.gradient_clipping import check, gradients_of


@torch.no_grad()
def gradient_clipping(parameters: Iterable[Tensor] | Tensor, max_l2_norm: float, *, eps: float = 1e-6) -> Tensor:
    """See the contract. Gradients are grouped by device and dtype, which is what the multi-tensor operators take."""
    check(max_l2_norm, eps)
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient in gradients_of(parameters):
        groups[gradient.device, gradient.dtype].append(gradient)
    if not groups:
        return torch.zeros(())
    wide = torch.float64 if any(dtype == torch.float64 for _, dtype in groups) else torch.float32
    home = next(iter(groups))[0]
    norms = [norm.to(home) for group in groups.values() for norm in torch._foreach_norm(group, 2.0, dtype=wide)]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    factor = torch.where(norm > max_l2_norm, max_l2_norm / (norm + eps), 1.0)
    for (device, _), group in groups.items():
        torch._foreach_mul_(group, factor.to(device))
    return norm
