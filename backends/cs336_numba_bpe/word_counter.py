"""Counting the pretokens of files on several threads: each has a table of its own; the tables are added at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from cs336_registry.text.inputs import byte_texts, is_plain

from .byte_ranges import ByteRange, cut_into_ranges
from .character_classes import load_character_classes
from .compile_cache import default_cache_folder, load_kernels
from .count_table import CountTable, WordCounts
from .special_token_table import build_special_token_table
from .text_buffer import TextBuffer

if TYPE_CHECKING:
    from .corpus import Options
    from .spill import SpilledRuns

RANGE_BYTES = 8 << 20
MIN_RANGE_BYTES = 1 << 20
FIRST_BITS = 16
KEPT_FROM_BYTES = 4 << 20
"""Counting a smaller file takes no longer than keeping its counts."""

Source = ByteRange | Path


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WordCounter:
    """Counts files with one pattern and one set of special tokens."""

    def __init__(self, pattern: int, special_tokens: Sequence[str], options: Options) -> None:
        self.pattern, self.options = pattern, options
        self.special_tokens = build_special_token_table(special_tokens)
        self.num_threads = options.num_threads or available_cpus()
        if options.max_ram is not None:
            self.num_threads = self._threads_within(options.max_ram)
        self.kernels = load_kernels("count", announce=options.announce)
        self.classes = load_character_classes(default_cache_folder())

    def _threads_within(self, max_ram: int) -> int:
        from .memory_estimate import threads_within

        number = threads_within(max_ram, self.num_threads)
        if number < self.num_threads:
            self.options.report(f"max_ram has room for the tables of {number} of {self.num_threads} threads")
        return number

    def count(self, paths: Sequence[Path], advance: Callable[[int], None] = lambda num_bytes: None) -> WordCounts:
        """The unique pretokens of all files with their counts. `advance` is told the bytes that were read."""
        cache = self.options.cache
        if cache is None:
            return self._count_sources(self._sources(paths), advance)
        from .kept_counts import load_words, save_words

        total = self._new_table()
        small = [path for path in paths if path.is_file() and os.path.getsize(path) < KEPT_FROM_BYTES]
        if small:
            total.add_words(self._count_sources(self._sources(small), advance))
        passed_over = set(small)
        for file_number, path in enumerate(paths):
            if path in passed_over:
                continue
            shards = _shards(self._sources([path]))
            for sources in shards:
                name = cache.identity.shard(file_number, *_extent(sources)) if len(paths) + len(shards) > 2 else None
                words = None if name is None else load_words(cache.load_shard(name))
                if words is None:
                    words = self._count_sources(sources, advance)
                    if name is not None:
                        save_words(lambda counts, name=name: cache.save_shard(name, counts), words)
                total.add_words(words)
        return total.words()[0]

    def count_ranges(self, ranges: Sequence[ByteRange]) -> WordCounts:
        """The words of some parts of the corpus."""
        return self._count_sources(ranges, lambda num_bytes: None)

    def _new_table(self) -> CountTable:
        return CountTable(self.kernels, self.pattern, self.special_tokens, self.classes, FIRST_BITS)

    def _runs(self, num_tables: int) -> AbstractContextManager[SpilledRuns | None]:
        if self.options.max_ram is None:
            return nullcontext()
        from .spill import SpilledRuns

        return SpilledRuns(self.options.max_ram, num_tables, self.options.report)

    def _sources(self, paths: Sequence[Path]) -> list[Source]:
        """Byte ranges of plain files, and other files whole, which come first because they can't be shared out."""
        plain = list(filter(is_plain, paths))
        size = sum(os.path.getsize(path) for path in plain)
        range_bytes = max(MIN_RANGE_BYTES, min(RANGE_BYTES, size // (4 * self.num_threads)))
        if self.special_tokens.need_decoded_text:
            range_bytes = size + 1
        shared_out = set(plain)
        sources: list[Source] = [path for path in paths if path not in shared_out]
        return sources + cut_into_ranges(plain, self.pattern, self.special_tokens.tokens, range_bytes)

    def _count_sources(self, sources: Sequence[Source], advance: Callable[[int], None]) -> WordCounts:
        queue: SimpleQueue[Source] = SimpleQueue()
        for source in sources:
            queue.put(source)
        tables = [self._new_table() for _ in range(max(1, min(self.num_threads, len(sources))))]
        stopped = Event()
        with self._runs(len(tables)) as runs:

            def work(table: CountTable) -> None:
                buffer = TextBuffer(table, always_decode=self.special_tokens.need_decoded_text)
                while (source := _next(queue)) is not None:
                    for read in _feed(buffer, source):
                        if stopped.is_set():
                            return
                        advance(read)
                        if runs is not None:
                            runs.spill_if_full(table)

            in_threads(work, tables, stop=stopped.set)
            if runs is not None and runs.spilled:
                for table in tables:
                    runs.spill(table)
                return runs.merge(tables[0])
        tables.sort(key=len, reverse=True)
        while len(tables) > 1:
            half = (len(tables) + 1) // 2
            in_threads(_add_second, list(zip(tables, tables[half:], strict=False)))
            tables = tables[:half]
        return tables[0].words()[0]


def in_threads(work: Callable[[Any], None], parts: Sequence[Any], stop: Callable[[], None] = lambda: None) -> None:
    """Call `work` on every part at once, and raise what the first one that failed has raised.

    stop: called when one fails or the caller is interrupted, to tell the others.
    """
    errors: list[BaseException] = []

    def call(part: Any) -> None:
        try:
            work(part)
        except BaseException as error:  # raised again by the thread that waits
            errors.append(error)
            stop()

    threads = [Thread(target=call, args=(part,)) for part in parts[1:]]
    for thread in threads:
        thread.start()
    call(parts[0])
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        stop()
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]


def _add_second(pair: tuple[CountTable, CountTable]) -> None:
    first, second = pair
    first.add(second)
    second.clear(1)


def _next(queue: SimpleQueue[Source]) -> Source | None:
    try:
        return queue.get_nowait()
    except Empty:
        return None


def _feed(buffer: TextBuffer, source: Source) -> Iterator[int]:
    if isinstance(source, ByteRange):
        yield from buffer.read_range(source.path, source.begin, source.end)
        return
    for blocks in byte_texts(source):
        yield from buffer.read_blocks(blocks)


def _shards(sources: Sequence[Source]) -> list[list[Source]]:
    """Neighbouring sources of one file in groups of about SHARD_BYTES."""
    from .corpus import SHARD_BYTES

    shards: list[list[Source]] = []
    for source in sources:
        if not shards or _extent([source])[1] - _extent(shards[-1])[0] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(source)
    return shards


def _extent(sources: Sequence[Source]) -> tuple[int, int]:
    """Where a shard begins and ends in its file."""
    first, last = sources[0], sources[-1]
    if isinstance(first, ByteRange) and isinstance(last, ByteRange):
        return first.begin, last.end
    return 0, os.path.getsize(first) if isinstance(first, Path) else 0
