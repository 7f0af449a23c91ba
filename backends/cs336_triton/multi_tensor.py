"""One launch over many tensors: tables of addresses on the device, and the walk over them in chunks.

A launch reads two tables. The chunk table has one row per program, (tensor, first entry), and depends on the tensors'
sizes alone. The address table has one row per tensor: an address for each operand, then the number of entries. Both are
cached by their content, so that a training step whose tensors stay in place copies nothing to the device. A copy is
made from pinned memory without waiting; under a CUDA graph the memory behind a captured copy is kept for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from .runtime import launch

CHUNK = 16384
"""Entries of one tensor that one program walks over."""

ALIGNMENT = 16
"""Bytes that one thread moves at once, where every address allows it."""

_captured: list[Any] = []


@triton.jit
def chunk_of(chunk_pointer, address_pointer, COLUMNS: tl.constexpr):
    """(address row, first entry, number of entries from there to the tensor's end) of this program's chunk."""
    chunk = chunk_pointer + 2 * tl.program_id(0).to(tl.int64)
    row = address_pointer + tl.load(chunk) * COLUMNS
    first = tl.load(chunk + 1)
    return row, first, tl.load(row + COLUMNS - 1) - first


@triton.jit
def operand(row, first, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to entry `first` of the tensor whose address is in a column of an address row."""
    # The hint goes on the sum: the compiler's analysis does not look through a conversion from integer to pointer.
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(DTYPE)) + first
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def launch_over(
    kernel: Any, operands: Sequence[Sequence[torch.Tensor]], *arguments: Any, num_warps: int = 4, **constants: Any
) -> None:
    """Launch `kernel(chunks, addresses, *arguments)` with one program per chunk of contiguous tensors.

    `operands` lists, for each operand, one tensor per walked tensor. COLUMNS, CHUNK and ALIGNED are constants.
    """
    numels = tuple(tensor.numel() for tensor in operands[0])
    device = operands[0][0].device
    addresses = tuple(tensor.data_ptr() for operand_tensors in operands for tensor in operand_tensors)
    # A table that another stream is still copying must not be used: each stream has its own.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    chunks = _chunk_table(numels, device, stream)
    launch(
        kernel,
        (chunks.shape[0],),
        chunks,
        _address_table(addresses, numels, device, stream),
        *arguments,
        COLUMNS=len(operands) + 1,
        CHUNK=CHUNK,
        ALIGNED=all(address % ALIGNMENT == 0 for address in addresses),
        num_warps=num_warps,
        num_stages=2,
        **constants,
    )


def number_of_chunks(numels: Sequence[int]) -> int:
    return sum(-(-numel // CHUNK) for numel in numels)


@lru_cache(maxsize=64)
def _chunk_table(numels: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    per_tensor = -(-np.array(numels, dtype=np.int64) // CHUNK)
    tensors = np.repeat(np.arange(len(numels)), per_tensor)
    first_chunks = np.repeat(np.cumsum(per_tensor) - per_tensor, per_tensor)
    firsts = (np.arange(len(tensors)) - first_chunks) * CHUNK
    return _on_device(np.stack([tensors, firsts], axis=1), device)


@lru_cache(maxsize=64)
def _address_table(
    addresses: tuple[int, ...], numels: tuple[int, ...], device: torch.device, stream: int
) -> torch.Tensor:
    by_operand = np.array(addresses, dtype=np.int64).reshape(-1, len(numels))
    return _on_device(np.concatenate([by_operand.T, np.array(numels, dtype=np.int64)[:, None]], axis=1), device)


def _on_device(table: np.ndarray, device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(np.ascontiguousarray(table, dtype=np.int64))
    if device.type != "cuda":
        return host.to(device)
    pinned = host.pin_memory()
    on_device = pinned.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append((pinned, on_device))
    return on_device


def contiguous(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, those with gaps or another order replaced by copies (a knowing copy: kernels walk plain memory)."""
    return [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]


def write_back(copies: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> None:
    """Carry what a kernel wrote into the copies made by `contiguous` over to the tensors themselves."""
    for copy, tensor in zip(copies, tensors, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)


def group_by_type(*operands: Sequence[torch.Tensor]) -> list[tuple[list[torch.Tensor], ...]]:
    """The operands split into groups that one launch can serve: equal devices and dtypes, nothing empty."""
    one_kind = all(len({(tensor.device, tensor.dtype) for tensor in tensors}) == 1 for tensors in operands)
    if one_kind and all(tensor.numel() for tensor in operands[0]):
        # The usual case, answered without building a key for every tensor.
        return [tuple(list(tensors) for tensors in operands)]
    groups: dict[Any, tuple[list[torch.Tensor], ...]] = {}
    for tensors in zip(*operands, strict=True):
        if not tensors[0].numel():
            continue
        key = (tensors[0].device, *(tensor.dtype for tensor in tensors))
        group = groups.setdefault(key, tuple([] for _ in operands))
        for members, tensor in zip(group, tensors, strict=True):
            members.append(tensor)
    return list(groups.values())


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))
