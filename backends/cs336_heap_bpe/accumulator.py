"""Adding up counts within a memory budget: when a table outgrows it, it goes to disk sorted, and the sorted runs are
merged at the end, a record at a time.
"""

from __future__ import annotations

import heapq
import logging
import struct
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from cs336_registry.text.training_cache import WordCounts

logger = logging.getLogger(__name__)

BYTES_PER_ENTRY = 170
"""What an entry of dict[bytes, int] takes, about: the table's slot, the key's object and its text, the count."""
_RECORD = struct.Struct("<IQ")


class Accumulator:
    """The sum of many counts. `max_ram` (bytes) bounds its table; None keeps everything in memory."""

    def __init__(self, max_ram: int | None = None) -> None:
        # Half for the table: the counts that are being added, and the merge's arrays later, need room too.
        self.most_entries = None if max_ram is None else max(1000, max_ram // 2 // BYTES_PER_ENTRY)
        self.table: dict[bytes, int] = {}
        self.runs: list[Path] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __enter__(self) -> Accumulator:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, counts: Mapping[bytes, int]) -> None:
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
        text, lengths, counts = bytearray(), array("I"), array("Q")
        last = None
        for pretoken, count in heapq.merge(*map(_read_run, self.runs)):
            if pretoken == last:
                counts[-1] += count
                continue
            last = pretoken
            text += pretoken
            lengths.append(len(pretoken))
            counts.append(count)
        return WordCounts(bytes(text), np.frombuffer(lengths, np.uint32), np.frombuffer(counts, np.int64))

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="cs336-counts-")
        path = Path(self._folder.name) / f"run_{len(self.runs)}"
        with open(path, "wb") as file:
            for pretoken in sorted(self.table):
                file.write(_RECORD.pack(len(pretoken), self.table[pretoken]) + pretoken)
        logger.info("%d distinct pretokens went to disk as a sorted run, to stay within max_ram", len(self.table))
        self.runs.append(path)
        self.table.clear()


def _read_run(path: Path) -> Iterator[tuple[bytes, int]]:
    with open(path, "rb", buffering=1 << 16) as file:
        while header := file.read(_RECORD.size):
            length, count = _RECORD.unpack(header)
            yield file.read(length), count
