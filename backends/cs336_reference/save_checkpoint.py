"""Saving a checkpoint through torch.save; what it holds is the contract's `payload`."""

from __future__ import annotations

import os
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
    content = payload(model, optimizer, iteration)
    if not is_path(out):
        torch.save(content, out)
        return
    with atomic_write(out) as file:
        torch.save(content, file)
