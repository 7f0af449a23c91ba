"""Loading a checkpoint: read everything, check everything, and only then change the model."""

from __future__ import annotations

import os
from typing import IO

import torch

from cs336_registry.components.load_checkpoint import check, check_content, reading
from cs336_registry.components.save_checkpoint import uncompiled


def load_checkpoint(
    src: str | os.PathLike[str] | IO[bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> int:
    """See the contract. Tensors are read to the CPU first: the file may come from a machine with other devices."""
    check(src)
    with reading(src):
        content = torch.load(src, map_location="cpu", weights_only=True)
    check_content(content, src, model, optimizer)
    uncompiled(model).load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return content["iteration"]
