"""Random windows of a token array: one gather on the host, then one copy to the device that does not wait."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cs336_registry.components.get_batch import check


def get_batch(
    dataset: np.ndarray,
    batch_size: int,
    context_length: int,
    device: str | torch.device = "cpu",
    *,
    generator: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    check(dataset, batch_size, context_length)
    generator = np.random.default_rng() if generator is None else generator
    starts = generator.integers(0, len(dataset) - context_length, batch_size)
    windows = torch.from_numpy(dataset[starts[:, None] + np.arange(context_length + 1)].astype(np.int64))
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
