"""Loading a checkpoint with the file mapped into memory: weights are copied once, from the file to where they stay."""

from __future__ import annotations

import os
from typing import IO, Any

import torch
from torch import Tensor

from cs336_registry.components.load_checkpoint import check, check_content, reading
from cs336_registry.components.save_checkpoint import is_path, uncompiled


def load_checkpoint(
    src: str | os.PathLike[str] | IO[bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> int:
    """See the contract. A file object can't be mapped and is read."""
    check(src)
    with reading(src):
        content = torch.load(src, map_location="cpu", weights_only=True, mmap=True if is_path(src) else None)
    check_content(content, src, model, optimizer)
    uncompiled(model).load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(_unmapped(content["optimizer"]))
    return content["iteration"]


def _unmapped(state: Any) -> Any:
    """The optimizer keeps the tensors it is given, so they must not be windows into a file that may be overwritten."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _unmapped(value) for key, value in state.items()}
    return state
