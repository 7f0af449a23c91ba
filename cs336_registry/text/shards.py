"""A corpus in shards that can be counted anywhere: a file, or a byte range of a plain file between two safe cuts.

How a file is cut depends on its content alone, never on who counts: a shard is the same on every machine.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .byte_ranges import byte_ranges
from .counts_file import Shard
from .inputs import BLOCK_SIZE, STANDARD_INPUT, is_plain
from .training_cache import WordCounts, file_identity


@dataclass(frozen=True)
class FileRange:
    """The bytes from `start` to `end` of a file of `size` bytes."""

    path: Path
    start: int
    end: int
    size: int

    @property
    def is_whole(self) -> bool:
        return (self.start, self.end) == (0, self.size)


def file_ranges(
    paths: Sequence[Path], pattern: str, special_tokens: Sequence[str], range_bytes: int | None = None
) -> list[FileRange]:
    """The files as ranges of about `range_bytes` (None: whole files); files that are not plain stay whole."""
    ranges: list[FileRange] = []
    for path in paths:
        if path == STANDARD_INPUT or not path.is_file():
            raise ValueError(f"{str(path)!r} can't be read twice, so it can't be a shard: save it to a file first")
        size = path.stat().st_size
        cuts = [(0, size)]
        if range_bytes is not None and is_plain(path) and size > range_bytes:
            cuts = byte_ranges(path, pattern, special_tokens, range_bytes)
        ranges += [FileRange(path, start, end, size) for start, end in cuts]
    return ranges


def identities(ranges: Sequence[FileRange]) -> list[Shard]:
    """What the ranges hold, by content; every file is read once."""
    digests = {path: file_identity(path) for path in dict.fromkeys(one.path for one in ranges)}
    for one in ranges:
        if digests[one.path][0] != one.size:
            raise ValueError(f"{one.path} changed while it was read: count it again when it is complete")
    return [Shard(*digests[one.path], one.start, one.end) for one in ranges]


def count_range(
    counter: Callable[..., dict[bytes, int]],
    one: FileRange,
    special_tokens: Sequence[str],
    pattern: str,
    **options: Any,
) -> WordCounts:
    """The sorted counts of one range by any implementation of `pretoken_counter`."""
    if one.is_whole:
        return WordCounts.of(counter(one.path, special_tokens, pattern=pattern, **options))
    with _as_pipe(one) as pipe:
        return WordCounts.of(counter(pipe, special_tokens, pattern=pattern, **options))


@contextmanager
def _as_pipe(one: FileRange) -> Iterator[Path]:
    """A named pipe that gives the bytes of the range: what every reader of files can read."""
    with tempfile.TemporaryDirectory(prefix="cs336-range-") as folder:
        pipe = Path(folder) / "range.txt"
        os.mkfifo(pipe)
        failed: list[OSError] = []

        def feed() -> None:
            # The reader may end early, by an error of its own.
            with suppress(BrokenPipeError):
                try:
                    with open(one.path, "rb") as source, open(pipe, "wb", buffering=0) as sink:
                        source.seek(one.start)
                        left = one.end - one.start
                        while left and (block := source.read(min(left, BLOCK_SIZE))):
                            left -= len(block)
                            _write_all(sink.fileno(), block)
                        if left:
                            raise OSError(f"{one.path} became shorter while it was read")
                except BrokenPipeError:
                    raise
                except OSError as error:
                    failed.append(error)

        thread = threading.Thread(target=feed, daemon=True)
        thread.start()
        try:
            yield pipe
        finally:
            # Where nobody opened the pipe, the writer waits for a reader: let it go.
            while thread.is_alive():
                reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
                thread.join(0.05)
                os.close(reader)
        if failed:
            raise failed[0]


def _write_all(descriptor: int, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[os.write(descriptor, view) :]
