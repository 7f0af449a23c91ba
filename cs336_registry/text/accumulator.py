"""Adding up counts within a memory budget: when a table outgrows it, it goes to disk sorted, and the sorted runs are
merged at the end, a record at a time.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .training_cache import WordCounts

BYTES_PER_ENTRY = 170
"""What an entry of dict[bytes, int] takes, about: the table's slot, the key's object and its text, the count."""
_RECORD = struct.Struct("<IQ")


class Accumulator:
    """The sum of many counts. `most_bytes` bounds its table; None keeps everything in memory."""

    def __init__(self, most_bytes: int | None = None, report: Callable[[str], None] = lambda message: None) -> None:
        self.most_entries = None if most_bytes is None else max(1000, most_bytes // BYTES_PER_ENTRY)
        self.report = report
        self.table: dict[bytes, int] = {}
        self.runs: list[Path] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Accumulator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, counts: WordCounts) -> None:
        table, get = self.table, self.table.get
        for pretoken, count in counts.items():
            table[pretoken] = get(pretoken, 0) + count
        if self.most_entries is not None and len(table) > self.most_entries:
            self._spill()

    def total(self) -> WordCounts:
        """All counts, sorted by pretoken."""
        if not self.runs:
            return WordCounts.of(self.table)
        if self.table:
            self._spill()
        self.report(f"merging {len(self.runs)} sorted runs")
        return WordCounts.merged(map(_read_run, self.runs))

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="cs336-counts-")
        path = Path(self._folder.name) / f"run_{len(self.runs)}"
        with open(path, "wb") as file:
            for pretoken in sorted(self.table):
                file.write(_RECORD.pack(len(pretoken), self.table[pretoken]) + pretoken)
        self.report(f"{len(self.table):,} distinct pretokens went to {path} as a sorted run, to stay within max_ram")
        self.runs.append(path)
        self.table.clear()


def _read_run(path: Path) -> Iterator[tuple[bytes, int]]:
    with open(path, "rb", buffering=1 << 16) as file:
        while header := file.read(_RECORD.size):
            length, count = _RECORD.unpack(header)
            yield file.read(length), count
