"""Files that must stay as they are while they are read: what is counted is kept under what a file held at the start."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

FileStates = Mapping[Path, tuple[int, int]]
"""Sizes (bytes) and times of change (ns) of files."""


def file_states(paths: Iterable[Path]) -> FileStates:
    """The files' states, to be taken before they are identified."""
    return {path: _state(path) for path in paths if path.is_file()}


def refuse_changed(states: FileStates, paths: Iterable[Path]) -> None:
    """Raises ValueError for a file that is no longer in the state it had in `states`."""
    for path in paths:
        if path in states and _state(path) != states[path]:
            raise changed(path)


def changed(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(f"{os.fspath(path)} changed while it was read: run this again when it is complete")


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
