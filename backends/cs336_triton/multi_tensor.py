"""One launch over many tensors: tables of addresses on the device, and the walk over them in chunks.

A launch reads two tables. The chunk table has one row per program, (tensor, first entry), and depends on the tensors'
sizes alone. The address table has one row per tensor: an address for each operand, then the number of entries. Both are
cached by their content, so that a training step whose tensors stay in place copies nothing to the device. A copy is
made from pinned memory without waiting. A CUDA graph's tables and the memory they are copied from are kept for good;
that memory is pinned beforehand, by the calls that warm up.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    chunks = _table(_chunks, numels, device)
    launch(
        kernel,
        (chunks.shape[0],),
        chunks,
        _table(_addresses, (addresses, numels), device),
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


def _chunks(numels: tuple[int, ...]) -> np.ndarray:
    per_tensor = -(-np.array(numels, dtype=np.int64) // CHUNK)
    tensors = np.repeat(np.arange(len(numels)), per_tensor)
    first_chunks = np.repeat(np.cumsum(per_tensor) - per_tensor, per_tensor)
    firsts = (np.arange(len(tensors)) - first_chunks) * CHUNK
    return np.stack([tensors, firsts], axis=1)


def _addresses(content: tuple[tuple[int, ...], tuple[int, ...]]) -> np.ndarray:
    addresses, numels = content
    by_operand = np.array(addresses, dtype=np.int64).reshape(-1, len(numels))
    return np.concatenate([by_operand.T, np.array(numels, dtype=np.int64)[:, None]], axis=1)


MOST_TABLES = 128
PINNED_ENTRIES = 1 << 20
TABLES_OF_A_CAPTURE = 4
"""As large as the largest: chunk tables for the norm, the scaling and the update, and the small address tables."""
_tables: dict[Any, torch.Tensor] = {}
_captured: list[Any] = []
_pinned: list[torch.Tensor] = []
"""Memory for the tables of CUDA graphs, pinned before a capture begins: a capture may forbid to pin any."""


def reserve(entries: int) -> None:
    """Have pinned memory for tables of `entries` numbers in all (8 bytes each) in CUDA graphs yet to be captured."""
    if not _pinned or _pinned[0].numel() < entries:
        _pinned[:] = [torch.empty(max(entries, PINNED_ENTRIES), dtype=torch.int64, pin_memory=True)]


def _table(make: Any, content: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """`make(content)` on the device: kept for the next call, and for good where a CUDA graph reads it."""
    # A table that another stream is still copying must not be used: each stream has its own.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = (make, content, device, stream)
    table = _tables.get(key)
    if table is None:
        host = torch.from_numpy(np.ascontiguousarray(make(content), dtype=np.int64))
        table = _on_device(host, device, capturing)
        # What is copied during a capture arrives when the graph runs: no other call may count on it.
        if not capturing:
            while len(_tables) >= MOST_TABLES:
                del _tables[next(iter(_tables))]
            _tables[key] = table
    if capturing:
        _captured.append(table)
    return table


def _on_device(host: torch.Tensor, device: torch.device, capturing: bool) -> torch.Tensor:
    if device.type != "cuda":
        return host.to(device)
    if not capturing:
        # A capture of the step makes such tables anew, those of the norm, the scaling and the update.
        reserve(TABLES_OF_A_CAPTURE * host.numel())
        return host.pin_memory().to(device, non_blocking=True)
    left = _pinned[0].numel() if _pinned else 0
    if host.numel() > left:
        raise RuntimeError(
            f"cs336_triton: this CUDA graph needs pinned memory for a table of {host.numel()} numbers and {left} are "
            f"left, and a capture may not pin any: run the step once before capturing it, or, where many graphs are "
            f"captured, call cs336_triton.multi_tensor.reserve({TABLES_OF_A_CAPTURE * host.numel()}) before each"
        )
    memory, _pinned[0] = _pinned[0].split([host.numel(), left - host.numel()])
    pinned = memory.view(host.shape).copy_(host)
    _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


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
