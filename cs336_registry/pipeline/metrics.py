"""The run's metrics: one JSON object a line, only ever appended.

A resumed run writes {"kind": "resume", "step": N}; rows of later steps that stand before it were lost with the process
that wrote them, and readers drop them. A last line that a crash cut short is dropped as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Watcher = Callable[[Row], None]
"""Called with every row as it is written; what it raises ends the run."""


class MetricsLog:
    """Appends rows to a file, and shows each to the watchers."""

    def __init__(self, path: Path, watchers: Sequence[Watcher] = ()) -> None:
        self.path, self.watchers = path, watchers
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 (open as long as the run)
        if self._file.tell() and not self._ends_a_line():
            self._file.write(b"\n")

    def append(self, kind: str, step: int, **values: Any) -> None:
        row = {"kind": kind, "step": step, **values}
        self._file.write((json.dumps(row) + "\n").encode())
        for watcher in self.watchers:
            watcher(row)

    def flush(self, *, sync: bool = False) -> None:
        self._file.flush()
        if sync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _ends_a_line(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"


class SilentLog(MetricsLog):
    """The log of a process that leaves writing to another."""

    def __init__(self) -> None:
        """There is no file."""

    def append(self, kind: str, step: int, **values: Any) -> None:
        """Another process writes this row."""

    def flush(self, *, sync: bool = False) -> None:
        """There is nothing to flush."""

    def close(self) -> None:
        """There is nothing to close."""


def read_metrics(path: Path) -> list[Row]:
    """The rows that count, in order of writing."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            # Cut short by a crash. Its step is repeated after the resume row that follows.
            continue
        if row["kind"] == "resume":
            rows = [one for one in rows if one["step"] <= row["step"]]
        rows.append(row)
    return rows


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]
