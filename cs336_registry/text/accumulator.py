"""Adding up counts within a memory budget: when a table outgrows it, it goes to disk sorted, and the sorted runs are
merged at the end, a record at a time. Where they are more than files may be open, some become longer runs first.
"""

from __future__ import annotations

import heapq
import os
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from .files import DISK_FULL
from .training_cache import WordCounts

BYTES_PER_ENTRY = 170
"""What an entry of dict[bytes, int] takes, about: the table's slot, the key's object and its text, the count."""
MOST_OPEN = 128
"""Runs that are merged at once: systems let a process open 256 files or more."""
_RECORD = struct.Struct("<IQ")


class Accumulator:
    """The sum of many counts. `most_bytes` bounds its table; None keeps everything in memory."""

    def __init__(self, most_bytes: int | None = None, report: Callable[[str], None] = lambda message: None) -> None:
        self.most_entries = None if most_bytes is None else max(1000, most_bytes // BYTES_PER_ENTRY)
        self.report = report
        self.table: dict[bytes, int] = {}
        self.runs: list[Path] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._runs_written = 0

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
        while len(self.runs) > MOST_OPEN:
            # No more than it takes, so that little is written twice; each goes as soon as it is in a longer one.
            merged = self.runs[: min(MOST_OPEN, len(self.runs) - MOST_OPEN + 1)]
            path = self._write_run(_summed(map(_read_run, merged)))
            self.runs = [*self.runs[len(merged) :], path]
            for run in merged:
                run.unlink()
        return WordCounts.merged(map(_read_run, self.runs))

    def _spill(self) -> None:
        path = self._write_run((pretoken, self.table[pretoken]) for pretoken in sorted(self.table))
        self.report(f"{len(self.table):,} distinct pretokens went to {path} as a sorted run, to stay within max_ram")
        self.runs.append(path)
        self.table.clear()

    def _write_run(self, records: Iterable[tuple[bytes, int]]) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="cs336-counts-")
        path = Path(self._folder.name) / f"run_{self._runs_written}"
        self._runs_written += 1
        try:
            with open(path, "wb") as file:
                for pretoken, number in records:
                    file.write(_RECORD.pack(len(pretoken), number) + pretoken)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            why = os.strerror(error.errno)
            told = f"{why} for counts that outgrew max_ram: free some, or set TMPDIR to a folder with more"
            raise OSError(error.errno, told, self._folder.name) from None
        return path


def _summed(sources: Iterable[Iterable[tuple[bytes, int]]]) -> Iterator[tuple[bytes, int]]:
    """The sorted records of all sources, those of one pretoken as their sum."""
    for pretoken, records in groupby(heapq.merge(*sources), key=itemgetter(0)):
        yield pretoken, sum(number for _, number in records)


def _read_run(path: Path) -> Iterator[tuple[bytes, int]]:
    with open(path, "rb", buffering=1 << 16) as file:
        while header := file.read(_RECORD.size):
            length, count = _RECORD.unpack(header)
            yield file.read(length), count
