"""The components of a run: resolved once, before the first step, with the decisions that a run records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cs336_registry as registry

TRAINING = (
    "transformer_lm",
    "get_batch",
    "cross_entropy",
    "gradient_clipping",
    "adamw",
    "lr_cosine_schedule",
    "save_checkpoint",
    "load_checkpoint",
    "generate",
)
"""What training, evaluation and generation take from the registry, in data-flow order."""
WITHOUT_TENSORS = ("lr_cosine_schedule", "save_checkpoint", "load_checkpoint")


@dataclass(frozen=True)
class Resolved:
    """Callables and decisions by component name."""

    callables: Mapping[str, Callable[..., Any]]
    decisions: Mapping[str, dict[str, Any]]

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.callables[name]

    @property
    def fingerprints(self) -> dict[str, str]:
        """backend and code of every component, such as {"adamw": "torch 3f0c…"}."""
        return {name: f"{one['backend']} {one['fingerprint']}" for name, one in self.decisions.items()}


def resolve(backend: str | None, device: str, names: tuple[str, ...] = TRAINING) -> Resolved:
    """Choose every component for float32 parameters on `device`. Raises what `registry.get` raises."""
    callables, decisions = {}, {}
    for name in names:
        where = None if name in WITHOUT_TENSORS else device
        callables[name] = registry.get(name, backend=backend, device=where)
        decisions[name] = registry.resolve(name, backend=backend, device=where).to_dict()
    return Resolved(callables, decisions)
