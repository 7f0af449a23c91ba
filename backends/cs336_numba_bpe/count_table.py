"""A table of pretokens and their counts, grown from Python."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from . import blocks
from .constants import (
    ARENA_USED,
    BATCH,
    DONE,
    MAX_LOAD_DENOMINATOR,
    MAX_LOAD_NUMERATOR,
    NEEDED,
    NEEDS_TABLE,
    NOT_UTF8,
    STATE_LENGTH,
    STATUS,
    UNIQUE,
)
from .special_token_table import SpecialTokenTable

if TYPE_CHECKING:
    import numpy as np

ENDS = 4096


@dataclass(frozen=True)
class WordCounts:
    """Unique pretokens one after another in `word_bytes` (16 bytes longer than they are), word i from
    word_starts[i]."""

    word_bytes: memoryview | np.ndarray
    word_starts: memoryview | np.ndarray
    counts: memoryview | np.ndarray

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def num_bytes(self) -> int:
        return int(self.word_starts[-1])

    def words(self) -> list[bytes]:
        content, starts = self.word_bytes.tobytes(), self.word_starts.tolist()
        return [content[start:stop] for start, stop in itertools.pairwise(starts)]

    def to_dict(self) -> dict[bytes, int]:
        return dict(zip(self.words(), self.counts.tolist(), strict=True))

    @classmethod
    def from_dict(cls, counts: dict[bytes, int]) -> WordCounts:
        return cls(
            memoryview(bytearray(b"".join(counts) + bytes(16))),
            blocks.of("q", itertools.accumulate(map(len, counts), initial=0)),
            blocks.of("q", counts.values()),
        )


class CountTable:
    """Counts pretokens of text that is fed to it; see `kernels/count_table.py`."""

    def __init__(
        self,
        kernels: SimpleNamespace,
        pattern: int,
        special_tokens: SpecialTokenTable,
        classes: memoryview,
        bits: int = 16,
    ) -> None:
        self.kernels, self.pattern, self.special_tokens, self.classes = kernels, pattern, special_tokens, classes
        self.scratch = (blocks.zeros("Q", BATCH), blocks.zeros("Q", BATCH), blocks.zeros("q", BATCH))
        self.ends = blocks.zeros("q", ENDS)
        self.clear(bits)

    def clear(self, bits: int = 16) -> None:
        self.table = blocks.zeros("Q", 1 << bits, 4)
        self.arena = blocks.zeros("B", 1 << 16)
        self.state = blocks.zeros("q", STATE_LENGTH)

    def __len__(self) -> int:
        return self.state[UNIQUE]

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return self.table.nbytes + self.arena.nbytes

    @property
    def next_growth_bytes(self) -> int:
        """The most memory that the next growth would hold at once: the old table, the larger one and the arena."""
        slots = len(self.table)
        return 32 * (slots + slots * _growth_factor(slots)) + 2 * self.arena.nbytes

    def __call__(self, text: memoryview, start: int, stop: int, is_last: bool) -> tuple[int, bool]:
        while True:
            start = self.kernels.count_block(
                text, start, stop, is_last, self.pattern, *self.special_tokens.kernel_arguments, self.classes,
                self.ends, self.table, self.arena, self.state, *self.scratch,
            )  # fmt: skip
            status = self.state[STATUS]
            if status in (DONE, NOT_UTF8):
                return start, status == NOT_UTF8
            self.reserve(*((self.state[NEEDED], 0) if status == NEEDS_TABLE else (0, self.state[NEEDED])))

    def reserve(self, words: int, arena_bytes: int) -> None:
        """Make room for more words and for more bytes of long words."""
        slots = len(self.table)
        while (len(self) + words) * MAX_LOAD_DENOMINATOR > slots * MAX_LOAD_NUMERATOR:
            slots *= _growth_factor(slots)
        if slots > len(self.table):
            larger = blocks.zeros("Q", slots, 4)
            self.kernels.move_table(self.table, larger)
            self.table = larger
        used = self.state[ARENA_USED]
        if used + arena_bytes + 8 > len(self.arena):
            self.arena = blocks.grown(self.arena, max(2 * len(self.arena), used + arena_bytes + 8), used)

    def add(self, other: CountTable) -> None:
        self.reserve(0, other.state[ARENA_USED])
        slot = 0
        while True:
            slot = self.kernels.add_table(self.table, self.arena, self.state, other.table, other.arena, slot)
            if slot == len(other.table):
                return
            self.reserve(len(self.table), 0)

    def add_words(self, words: WordCounts) -> None:
        self.reserve(len(words), words.num_bytes)
        self.kernels.add_words(words.word_bytes, words.word_starts, words.counts, self.table, self.arena, self.state)

    def words(self, *, by_hash: bool = False) -> tuple[WordCounts, memoryview]:
        """All entries in the table's order, and their hashes where `by_hash` asks for them."""
        num_bytes = self.kernels.total_bytes(self.table)
        words = WordCounts(
            blocks.zeros("B", num_bytes + 16), blocks.zeros("q", len(self) + 1), blocks.zeros("q", len(self))
        )
        hashes = blocks.zeros("Q", len(self) if by_hash else 0)
        self.kernels.list_words(self.table, self.arena, hashes, words.word_bytes, words.word_starts, words.counts)
        return words, hashes


def _growth_factor(slots: int) -> int:
    return 4 if slots < (1 << 18) else 2
