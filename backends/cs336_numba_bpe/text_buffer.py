"""Feeding text to a kernel block by block: from a file's byte range, or from strings as they come.

A consumer is called with the padded buffer and says how far the text is settled; the rest is kept and comes again with
what follows, once that has doubled it, so that text which can't be cut is not looked through at every block. Where a
pretoken is longer than the buffer, the buffer grows. Bytes that are not UTF-8 are replaced by
U+FFFD as Python's decoder does, block by block, only where there are any.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from cs336_registry.text.changes import changed

from . import blocks
from .constants import PADDING

BLOCK_BYTES = 1 << 18


class Consumer(Protocol):
    def __call__(self, text: memoryview, start: int, stop: int, is_last: bool) -> tuple[int, bool]:
        """Take text[start:stop] as far as it is settled; returns (where to go on, whether bytes there are not
        UTF-8)."""
        ...


class TextBuffer:
    """Text that has been read and is not settled, at the beginning of a padded array."""

    def __init__(self, consumer: Consumer, *, always_decode: bool = False, block_bytes: int = BLOCK_BYTES) -> None:
        self.consumer, self.always_decode, self.block_bytes = consumer, always_decode, block_bytes
        self.array = blocks.zeros("B", 2 * block_bytes + PADDING)
        self.kept = self.settled_from = 0

    @property
    def capacity(self) -> int:
        return len(self.array) - PADDING

    def reserve(self, more: int) -> None:
        """Make room for `more` bytes behind those that are kept."""
        if self.kept + more > self.capacity:
            self.array = blocks.grown(self.array, max(2 * self.capacity, self.kept + more) + PADDING, self.kept)

    def settle(self, is_last: bool) -> None:
        """Let the consumer take what it can; keep the rest."""
        position = pending = 0
        if self.always_decode:
            pending = self._replace_invalid(0, is_last)
        while True:
            position, not_utf8 = self.consumer(self.array, position, self.kept - pending, is_last)
            if not not_utf8:
                break
            self._replace_invalid(position, is_last)
            position = 0
        rest = self.kept - position
        if rest and position:
            self.array[:rest] = self.array[position : self.kept]
        self.kept = rest
        self.settled_from = 2 * rest

    def _replace_invalid(self, position: int, is_last: bool) -> int:
        """Decode what is kept from `position` on; returns how many bytes at the end are a character's beginning."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(self.array[position : self.kept].tobytes(), final=is_last)
        pending = decoder.getstate()[0]
        content = text.encode() + pending
        self.kept = 0
        self.reserve(len(content))
        self.array[: len(content)] = content
        self.kept = len(content)
        return len(pending)

    def read_range(self, path: str | os.PathLike[str], begin: int, end: int) -> Iterator[int]:
        """Feed bytes begin..end of a file; yields how many were read after each block."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            position = begin
            while True:
                self.reserve(self.block_bytes)
                wanted = min(self.block_bytes, end - position)
                block = self.array[self.kept : self.kept + wanted]
                got = os.preadv(descriptor, [block], position) if wanted else 0
                if wanted and not got:
                    raise changed(path)
                position, self.kept = position + got, self.kept + got
                is_last = position >= end
                if is_last or self.kept >= self.settled_from:
                    self.settle(is_last)
                yield got
                if is_last:
                    return
        finally:
            os.close(descriptor)

    def append(self, content: bytes) -> None:
        self.reserve(len(content))
        self.array[self.kept : self.kept + len(content)] = content
        self.kept += len(content)

    def read_blocks(self, blocks: Iterable[bytes]) -> Iterator[int]:
        """Feed one text that comes in blocks; yields the size of each block after it and 0 at the end."""
        for block in blocks:
            self.append(block)
            if self.kept >= max(self.block_bytes, self.settled_from):
                self.settle(False)
            yield len(block)
        self.settle(True)
        yield 0
