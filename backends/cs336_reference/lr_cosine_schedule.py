"""The learning-rate schedule of the LLaMA papers: linear warm-up, half a cosine down, then the minimum."""

from __future__ import annotations

import math

from cs336_registry.components.lr_cosine_schedule import check


def lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """See the contract."""
    check(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)
    if it < warmup_iters:
        return it / warmup_iters * max_learning_rate
    if it == warmup_iters:
        return float(max_learning_rate)
    if it > cosine_cycle_iters:
        return float(min_learning_rate)
    progress = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_learning_rate + (1 + math.cos(math.pi * progress)) / 2 * (max_learning_rate - min_learning_rate)
