"""Which windows of the tokens a step trains on: random, decided by a seed, and continued exactly from a saved state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class Sampler:
    """Random batches of (inputs, targets) through the get_batch component."""

    def __init__(
        self,
        get_batch: Callable[..., Any],
        ids: np.ndarray,
        *,
        batch_size: int,
        context_length: int,
        device: str,
        seed: int,
    ) -> None:
        if len(ids) <= context_length:
            raise ValueError(
                f"the training text has {len(ids)} tokens and model.context_length is {context_length}: it needs "
                f"{context_length + 1} or more; pass more text or a shorter context"
            )
        self.get_batch, self.ids, self.device = get_batch, ids, device
        self.batch_size, self.context_length = batch_size, context_length
        self._generator = np.random.Generator(np.random.PCG64(seed))

    def batch(self) -> tuple[Any, Any]:
        """The next (inputs, targets), each (batch_size, context_length) int64."""
        return self.get_batch(self.ids, self.batch_size, self.context_length, self.device, generator=self._generator)

    @property
    def state(self) -> dict[str, Any]:
        """Plain data from which `state = ...` continues with the same batches."""
        return dict(self._generator.bit_generator.state)

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._generator.bit_generator.state = state
