"""Random windows of a token array, cut one by one."""

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
    inputs = np.stack([dataset[start : start + context_length].astype(np.int64) for start in starts])
    targets = np.stack([dataset[start + 1 : start + 1 + context_length].astype(np.int64) for start in starts])
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
