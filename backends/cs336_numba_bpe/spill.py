"""Keeping counts under a memory ceiling: full tables go to disk as runs sorted by hash, which are merged at the end.

A run is three arrays in a temporary folder: hashes with places, counts, and bytes. Sorted by hash, all runs can be
cut at the same hashes, so the merge takes one part of the hash range after another and never holds more than one
part's table.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from cs336_registry.text.memory import readable, refuse_beyond

from . import blocks
from .count_table import WordCounts
from .memory_estimate import lowest_ceiling, table_limit

if TYPE_CHECKING:
    from .count_table import CountTable


class SpilledRuns:
    """Runs of one counting. Use as a context manager: the folder goes when it ends, whatever happened."""

    def __init__(self, max_ram: int | None, num_tables: int, report: Callable[[str], None]) -> None:
        self.table_limit = None
        if max_ram is not None:
            refuse_beyond(max_ram, lowest_ceiling(num_tables), "counting")
            self.table_limit = table_limit(max_ram, num_tables)
        self.max_ram, self.report = max_ram, report
        self.folder: Path | None = None
        self.spilled: list[Path] = []
        self.lock = threading.Lock()

    def __enter__(self) -> SpilledRuns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)

    def spill_if_full(self, table: CountTable) -> None:
        """Spill where the table's next growth would pass its share: it holds old and new table while it grows."""
        if self.table_limit is not None and table.next_growth_bytes > self.table_limit:
            self.spill(table)

    def spill(self, table: CountTable) -> None:
        """Write a table as a run and empty it; one table at a time, as its sorted copy takes memory too."""
        with self.lock:
            self._spill(table)

    def _spill(self, table: CountTable) -> None:
        words, hashes = table.words(by_hash=True)
        table.clear()
        order = np.argsort(hashes)
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="cs336_counts_"))
            self.report(f"counts pass max_ram = {readable(self.max_ram)}: sorted runs go to {self.folder}")
        folder = self.folder / f"run_{len(self.spilled)}"
        folder.mkdir()
        self.spilled.append(folder)
        lengths = np.diff(words.word_starts)[order]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        np.save(folder / "hashes.npy", np.asarray(hashes)[order])
        np.save(folder / "counts.npy", np.asarray(words.counts)[order])
        np.save(folder / "starts.npy", starts)
        with open(folder / "bytes", "wb") as file:
            for first in range(0, len(order), 1 << 16):
                content = [
                    words.word_bytes[words.word_starts[word] : words.word_starts[word + 1]].tobytes()
                    for word in order[first : first + (1 << 16)].tolist()
                ]
                file.write(b"".join(content))

    def merge(self, table: CountTable) -> WordCounts:
        """Merge all runs, part of the hash range by part."""
        assert self.table_limit is not None
        total = sum((folder / "counts.npy").stat().st_size // 8 for folder in self.spilled)
        parts = 1
        while total / parts * 64 > self.table_limit:
            parts *= 2
        self.report(f"merging {len(self.spilled)} runs with {total} entries in {parts} parts")
        merged: list[WordCounts] = []
        for part in range(parts):
            low, high = (part << 64) // parts, ((part + 1) << 64) // parts - 1
            table.clear()
            for folder in self.spilled:
                table.add_words(_read_part(folder, low, high))
            merged.append(table.words()[0])
        table.clear(1)
        return _concatenate(merged)


def _read_part(folder: Path, low: int, high: int) -> WordCounts:
    hashes = np.load(folder / "hashes.npy", mmap_mode="r")
    first = int(np.searchsorted(hashes, np.uint64(low), "left"))
    last = int(np.searchsorted(hashes, np.uint64(high), "right"))
    starts = np.load(folder / "starts.npy", mmap_mode="r")[first : last + 1]
    begin, end = int(starts[0]), int(starts[-1])
    word_bytes = np.zeros(end - begin + 16, np.uint8)
    with open(folder / "bytes", "rb") as file:
        file.seek(begin)
        if file.readinto(memoryview(word_bytes)[: end - begin]) != end - begin:
            raise OSError(f"{os.fspath(folder)} is cut short: its disk may be full")
    counts = np.load(folder / "counts.npy", mmap_mode="r")[first:last]
    return WordCounts(word_bytes, np.ascontiguousarray(starts - begin), np.ascontiguousarray(counts))


def _concatenate(parts: list[WordCounts]) -> WordCounts:
    starts, offset = [np.zeros(1, np.int64)], 0
    for part in parts:
        starts.append(np.asarray(part.word_starts[1:]) + offset)
        offset += part.num_bytes
    word_bytes = blocks.zeros("B", offset + 16)
    offset = 0
    for part in parts:
        word_bytes[offset : offset + part.num_bytes] = part.word_bytes[: part.num_bytes]
        offset += part.num_bytes
    return WordCounts(word_bytes, np.concatenate(starts), np.concatenate([part.counts for part in parts]))
