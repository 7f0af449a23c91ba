"""Cross entropy, as the textbook has it: subtract the largest logit, then log-sum-exp minus the target's logit."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.cross_entropy import check


def cross_entropy(logits: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """See the contract. Each line below is one term of the formula."""
    check(logits, targets, reduction)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest logit becomes 0, so no exponential overflows; the shift cancels, so no gradient flows through it.
    shifted = wide - wide.amax(dim=-1, keepdim=True).detach()
    log_partition = shifted.exp().sum(dim=-1).log()
    target_logits = shifted.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    losses = log_partition - target_logits
    return reduced(losses, reduction).to(logits.dtype)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
