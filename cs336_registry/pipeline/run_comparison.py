"""Whether two runs are the same run: every measured number and every saved number, bit for bit, times left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import RunError
from .metrics import Row, of_kind
from .run_folder import RunFolder

TIMES = frozenset({"seconds", "seconds_each", "tokens_per_second", "mfu", "peak_memory"})
"""What the machine's load decides; all other values of a row are the run's own."""
KINDS = ("step", "evaluation", "sample")


@dataclass(frozen=True)
class Comparison:
    """How much was compared, and every difference, the earliest first."""

    rows: Mapping[str, int]
    tensors: int
    numbers: int
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not self.differences


def compare(one: Path, other: Path) -> Comparison:
    """The metrics of both runs and what is in their last checkpoints.

    Raises RunError where there is nothing to compare, so that two empty runs are not called equal.
    """
    first, second = RunFolder(one), RunFolder(other)
    differences: list[str] = []
    counts: dict[str, int] = {}
    for kind in KINDS:
        rows = of_kind(first.metrics(), kind)
        counts[kind] = len(rows)
        differences += _row_differences(kind, rows, of_kind(second.metrics(), kind))
    if not counts["step"]:
        raise RunError(f"{one} has no steps to compare: train it first")
    names = [sorted(path.name for path in run.checkpoints.glob("step-*")) for run in (first, second)]
    if not names[0] or not names[1]:
        raise RunError(f"{one if not names[0] else other} has no checkpoint to compare: train it to its end")
    if names[0][-1] != names[1][-1]:
        differences.append(f"last checkpoint: {names[0][-1]} and {names[1][-1]}")
    saved = [dict(_leaves("", _read(run, last[-1]))) for run, last in zip((first, second), names, strict=True)]
    for name in sorted(saved[0].keys() | saved[1].keys()):
        told = _difference(saved[0].get(name), saved[1].get(name))
        if told:
            differences.append(f"{name.lstrip('.')}: {told}")
    tensors = [value for value in saved[0].values() if isinstance(value, torch.Tensor)]
    return Comparison(counts, len(tensors), sum(tensor.numel() for tensor in tensors), tuple(differences))


def _row_differences(kind: str, rows: Sequence[Row], others: Sequence[Row]) -> Iterator[str]:
    if len(rows) != len(others):
        yield f"{kind} rows: {len(rows)} and {len(others)}"
    for row, other in zip(rows, others, strict=False):
        for key in sorted((row.keys() | other.keys()) - TIMES):
            if row.get(key) != other.get(key):
                yield f"{kind} {row['step']}: {key} {row.get(key)!r} and {other.get(key)!r}"


def _read(run: RunFolder, checkpoint: str) -> Any:
    return torch.load(run.checkpoints / checkpoint / "checkpoint.pt", map_location="cpu", weights_only=True)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Everything in nested dictionaries and lists, by its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}.{index}", inner)
    else:
        yield name, value


def _difference(one: Any, other: Any) -> str | None:
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return None if one == other else f"{one!r} and {other!r}"
    if one.dtype != other.dtype or one.shape != other.shape:
        return f"{one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    # Bits, not values: 0.0 == -0.0, and nan != nan.
    bits = [tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other)]
    if torch.equal(*bits):
        return None
    differ, largest = int((one != other).sum()), float((one.double() - other.double()).abs().max())
    signs = " (but bits do)" if not differ else ""
    return f"{differ:,} of {one.numel():,} numbers differ{signs}, by up to {largest:.3g}"
