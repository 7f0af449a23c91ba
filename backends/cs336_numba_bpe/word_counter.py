"""Counting the pretokens of files on several threads: each has a table of its own; the tables are added at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue

from cs336_registry.text.inputs import byte_texts, is_plain

from .byte_ranges import ByteRange, cut_into_ranges
from .character_classes import load_character_classes
from .compile_cache import default_cache_folder, load_kernels
from .count_table import CountTable, WordCounts
from .special_token_table import SpecialTokenTable, build_special_token_table
from .spill import SpilledRuns
from .text_buffer import TextBuffer

RANGE_BYTES = 8 << 20
MIN_RANGE_BYTES = 1 << 20

Report = Callable[[str], None]


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_words(
    paths: Sequence[Path],
    pattern: int,
    special_tokens: Sequence[str],
    *,
    num_threads: int | None = None,
    cache_folder: Path | None = None,
    max_ram: int | None = None,
    advance: Callable[[int], None] = lambda num_bytes: None,
    report: Report = lambda message: None,
) -> WordCounts:
    """The unique pretokens of all files with their counts. `advance` is told the bytes that were read, as they are."""
    special = build_special_token_table(special_tokens)
    plain = [path for path in paths if is_plain(path)]
    size = sum(os.path.getsize(path) for path in plain)
    num_threads = num_threads or available_cpus()
    range_bytes = max(MIN_RANGE_BYTES, min(RANGE_BYTES, size // (4 * num_threads)))
    if special.need_decoded_text or num_threads == 1:
        range_bytes = size + 1
    ranges: list[ByteRange | Path] = [path for path in paths if not is_plain(path)]
    ranges += cut_into_ranges(plain, pattern, special.tokens, range_bytes)
    num_threads = min(num_threads, len(ranges)) or 1
    counter = _Counter(pattern, special, cache_folder or default_cache_folder(), max_ram, num_threads, advance, report)
    return counter.run(ranges)


class _Counter:
    def __init__(
        self,
        pattern: int,
        special_tokens: SpecialTokenTable,
        cache_folder: Path,
        max_ram: int | None,
        num_threads: int,
        advance: Callable[[int], None],
        report: Report,
    ) -> None:
        kernels, classes = load_kernels("count", cache_folder), load_character_classes(cache_folder)
        bits = 16
        self.tables = [CountTable(kernels, pattern, special_tokens, classes, bits) for _ in range(num_threads)]
        self.special_tokens, self.advance, self.report = special_tokens, advance, report
        self.runs = SpilledRuns(max_ram, num_threads, report)

    def run(self, ranges: Sequence[ByteRange | Path]) -> WordCounts:
        queue: SimpleQueue[ByteRange | Path] = SimpleQueue()
        for byte_range in ranges:
            queue.put(byte_range)
        with self.runs:
            if len(self.tables) == 1:
                self._count(self.tables[0], queue)
            else:
                with ThreadPoolExecutor(len(self.tables)) as pool:
                    list(pool.map(lambda table: self._count(table, queue), self.tables))
            if self.runs.spilled:
                for table in self.tables:
                    self.runs.spill(table)
                return self.runs.merge(self.tables[0])
        first, *others = sorted(self.tables, key=len, reverse=True)
        for table in others:
            first.add(table)
            table.clear(1)
        return first.words()[0]

    def _count(self, table: CountTable, queue: SimpleQueue[ByteRange | Path]) -> None:
        buffer = TextBuffer(table, always_decode=self.special_tokens.need_decoded_text)
        while True:
            try:
                source = queue.get_nowait()
            except Empty:
                return
            for read in _feed(buffer, source):
                self.advance(read)
                self.runs.spill_if_full(table)


def _feed(buffer: TextBuffer, source: ByteRange | Path) -> Iterator[int]:
    if isinstance(source, ByteRange):
        yield from buffer.read_range(source.path, source.begin, source.end)
        return
    for blocks in byte_texts(source):
        yield from buffer.read_blocks(blocks)
