"""Cross entropy through F.cross_entropy, which fuses log-softmax and the look-up of the targets."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.cross_entropy import check

NO_TARGET_IS_IGNORED = -(2**62)
"""F.cross_entropy skips one target value, -100 by default; this one is nobody's padding mark."""


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """See the contract. F.cross_entropy wants the vocabulary second, so all leading dimensions become one."""
    check(logits, targets, reduction)
    return loss_of(logits, targets, reduction).to(logits.dtype)


def loss_of(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The loss in float32 (or float64)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(
        wide.reshape(targets.numel(), logits.shape[-1]),
        targets.reshape(-1).long(),
        reduction=reduction,
        ignore_index=NO_TARGET_IS_IGNORED,
    )
    return losses.reshape(targets.shape) if reduction == "none" else losses
