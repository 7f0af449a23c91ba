"""Checkpoints that several processes write at once, each its own part, and any number of processes can read.

torch.distributed.checkpoint decides who writes and reads what. Its storage here is safetensors, whose headers say
which rows a file holds: unlike its own format, which keeps that in a pickle, reading it runs no code. It is imported
when it is needed: that takes a while, and a process alone never does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Properties = Mapping[str, tuple[torch.Size, torch.dtype]]


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write what each process has (of a DTensor its part; a plain tensor is written once) and flush it to the disk."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _one_reason():
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


class ShardedTensors:
    """The tensors in a folder that `write` wrote. Each process reads what it needs; none waits for another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def properties(self) -> Properties:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        with _one_reason():
            metadata: Any = HuggingFaceStorageReader(str(self.folder)).read_metadata().state_dict_metadata
        return {name: (entry.size, entry.properties.dtype) for name, entry in metadata.items()}

    def read(self, targets: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        with _one_reason():
            load(dict(targets), storage_reader=HuggingFaceStorageReader(str(self.folder)), no_dist=True)


class WholeTensors:
    """A whole model and its optimizer's states, of which each process takes its part."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._tensors = weights(model)
        states = optimizer.state_dict()["state"]
        for index, (name, _) in enumerate(model.named_parameters()):
            self._tensors |= optimizer_tensors(name, states.get(index, {}))

    @property
    def properties(self) -> Properties:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, targets: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            whole = self._tensors[name]
            if isinstance(target, DTensor):
                # Without a source rank nothing is sent: every process has the whole and keeps its rows.
                part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
                target.to_local().copy_(part.to_local())
            else:
                target.copy_(whole)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """ "model.NAME" -> weight or buffer, those that layers share under one name."""
    unique = {name for name, _ in model.named_parameters()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - unique
    return {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items() if name not in shared}


def optimizer_tensors(parameter: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """ "optimizer.PARAMETER.NAME" -> state. A Python number (Triton's AdamW counts its steps so) becomes a tensor."""
    return {
        f"optimizer.{parameter}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in state.items()
    }


@contextmanager
def _one_reason() -> Iterator[None]:
    """OSError with the first reason, instead of every process's traceback; PyTorch's own warnings are not ours."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"rank {rank}: {reason}") from error
    except (SafetensorError, ValueError, KeyError) as error:
        raise OSError(str(error)) from error
