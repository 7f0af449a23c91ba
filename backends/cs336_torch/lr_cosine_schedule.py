"""The learning-rate schedule in tensor operations, so that it can also run on the device, inside a captured graph.

PyTorch's own schedulers are objects that count their calls and whose warm-up can't start at 0, so they can't answer
"the rate at iteration `it`"; torch.where and torch.cos can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.lr_cosine_schedule import check


def lr_cosine_schedule(
    it: int | Tensor, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float | Tensor:
    """See the contract. An integer tensor `it` gives a float64 tensor on its device, without waiting for it."""
    if isinstance(it, Tensor):
        check(0, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)
        return _rates(it.double(), max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)
    check(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)
    iterations = torch.tensor(it, dtype=torch.float64)
    return _rates(iterations, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters).item()


def _rates(it: Tensor, maximum: float, minimum: float, warmup: int, cycle: int) -> Tensor:
    rising = it * (maximum / max(warmup, 1))
    angle = torch.pi * (it - warmup) / max(cycle - warmup, 1)
    falling = minimum + (1 + torch.cos(angle)) / 2 * (maximum - minimum)
    return torch.where(it < warmup, rising, torch.where(it > cycle, minimum, falling))
