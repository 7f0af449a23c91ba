"""Files that must stay as they are while they are read: counts are kept under what a file held at the start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Stamp = tuple[int, int]


def stamps(paths: Sequence[Path]) -> list[Stamp | None]:
    """Size and time of the last change of each file, None for what is no file."""
    return [_stamp(path) if path.is_file() else None for path in paths]


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def refuse_changed(paths: Sequence[Path], before: Sequence[Stamp | None]) -> None:
    """ValueError where a file is not what it was when `before` was taken."""
    for path, stamp, now in zip(paths, before, stamps(paths), strict=True):
        if stamp != now:
            raise ValueError(f"{path} changed while it was read: start again when it is complete")
