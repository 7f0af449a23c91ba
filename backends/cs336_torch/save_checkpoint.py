"""Saving a checkpoint. torch.save is PyTorch's own way, and the reference takes it too: there is nothing else to do."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import IO

import torch

from cs336_registry.components.save_checkpoint import check, is_path, payload
from cs336_registry.text.files import atomic_write


def save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike[str] | IO[bytes],
) -> None:
    """See the contract."""
    check(iteration, out)
    with atomic_write(out) if is_path(out) else nullcontext(out) as file:
        torch.save(payload(model, optimizer, iteration), file)
