"""What counting and merging will take, before it is taken: a run that can't keep its ceiling is refused at its start.

The number of unique pretokens is projected from a sample by Heaps' law; once the words are counted, the same figures
come from them and are exact up to the merge loop's growth, for which the highest seen on prose, code and mixed text is
taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cs336_registry.text.inputs import is_plain
from cs336_registry.text.memory import growth, readable, refuse_beyond

from .byte_ranges import ByteRange, cut_into_ranges
from .merge_state import NARROW_SYMBOLS, NARROW_TOKENS

if TYPE_CHECKING:
    from .corpus import Options
    from .count_table import WordCounts
    from .word_counter import WordCounter

BASE_BYTES = 56 << 20
"""What the process holds without any table: the interpreter, numpy, character classes."""
BYTES_PER_THREAD = 8 << 20
"""A thread's text buffer, stack and smallest table."""
FIRST_GROWTH_BYTES = 11 << 20
"""Of a thread's table: the smallest one and the next."""
TABLE_SHARE = 0.35
"""Tables may take this share of what is left: a run that is written needs its sorted copy beside the tables, and the
merged words twice their size."""
BYTES_PER_SYMBOL, BYTES_PER_WIDE_SYMBOL = 24, 44
"""Of the merge loop, at its highest: a symbol, and its places while their arena grows."""
BYTES_PER_WORD = 16
"""A word's place and count."""
BYTES_PER_DICTIONARY_ENTRY = 170
SAMPLE_RANGE_BYTES, SAMPLE_RANGES = 1 << 20, 16
SAMPLED_FROM_BYTES = 4 * SAMPLE_RANGE_BYTES * SAMPLE_RANGES
"""Smaller corpora are counted before a sample of them would have told more."""
UNSURE = 1.25
"""An estimate from a sample refuses only what it passes by this factor; what is counted refuses by itself."""


@dataclass(frozen=True)
class Words:
    """How many unique pretokens there are, and their bytes together."""

    number: int
    num_bytes: int

    @property
    def symbols(self) -> int:
        return self.num_bytes + self.number + 1


def table_limit(max_ram: int, num_threads: int) -> int:
    """What a thread's table may take."""
    return int((max_ram - BASE_BYTES - num_threads * BYTES_PER_THREAD) * TABLE_SHARE) // num_threads


def threads_within(max_ram: int, wanted: int) -> int:
    """How many threads, one at least, can have tables that grow twice before they go to disk: smaller ones would go
    there at every block."""
    for num_threads in range(wanted, 1, -1):
        if table_limit(max_ram, num_threads) >= 2 * FIRST_GROWTH_BYTES and lowest_ceiling(num_threads) <= max_ram:
            return num_threads
    return 1


def lowest_ceiling(num_threads: int) -> int:
    """The least that counting can be kept under: tables as large again as the rest, half of which are being written."""
    return 2 * (BASE_BYTES + num_threads * BYTES_PER_THREAD)


def merging_bytes(words: Words, wide: bool) -> int:
    per_symbol = BYTES_PER_WIDE_SYMBOL if wide else BYTES_PER_SYMBOL
    return BASE_BYTES + words.num_bytes + BYTES_PER_WORD * words.number + per_symbol * words.symbols


def dictionary_bytes(words: Words) -> int:
    """Counts as a Python dictionary, beside the arrays it is made from."""
    return BASE_BYTES + 2 * words.num_bytes + (16 + BYTES_PER_DICTIONARY_ENTRY) * words.number


def project(counter: WordCounter, paths: Sequence[Path]) -> Words | None:
    """The words of a corpus, from 16 MiB all over it; None where it is small or not plain."""
    if not all(map(is_plain, paths)) or counter.special_tokens.need_decoded_text:
        return None
    size = sum(path.stat().st_size for path in paths)
    if size < SAMPLED_FROM_BYTES:
        return None
    ranges = cut_into_ranges(paths, counter.pattern, counter.special_tokens.tokens, SAMPLE_RANGE_BYTES)
    chosen = [ranges[index * len(ranges) // SAMPLE_RANGES] for index in range(SAMPLE_RANGES)]
    half, whole = (_sample(counter, part) for part in (chosen[::2], chosen))
    if not half[1].number:
        return None
    factor = growth(size, (half[0], half[1].number), (whole[0], whole[1].number))
    return Words(int(whole[1].number * factor), int(whole[1].num_bytes * factor))


def _sample(counter: WordCounter, ranges: Sequence[ByteRange]) -> tuple[int, Words]:
    words = counter.count_ranges(ranges)
    return sum(map(len, ranges)), Words(len(words), words.num_bytes)


class Ceiling:
    """max_ram, held against what the caller of the counts is going to do: merging, or making a dictionary of them."""

    def __init__(self, options: Options, *, merging: bool, max_tokens: int) -> None:
        self.options, self.merging, self.max_tokens = options, merging, max_tokens
        self.what = "merging" if merging else "the dictionary of counts"

    def needed(self, words: Words) -> int:
        if not self.merging:
            return dictionary_bytes(words)
        return merging_bytes(words, wide=words.symbols >= NARROW_SYMBOLS or self.max_tokens >= NARROW_TOKENS)

    def check_ahead(self, counter: WordCounter, paths: Sequence[Path]) -> None:
        max_ram = self.options.max_ram
        if max_ram is None:
            return
        refuse_beyond(max_ram, lowest_ceiling(counter.num_threads), "counting")
        words = project(counter, paths)
        if words is None:
            return
        needed, number = self.needed(words), f"about {words.number:,} unique pretokens, from a sample"
        self.options.report(f"{number}: {self.what} takes about {readable(needed)} of max_ram = {readable(max_ram)}")
        if needed > UNSURE * max_ram:
            refuse_beyond(max_ram, needed, f"{self.what} ({number})")

    def check(self, counts: WordCounts) -> None:
        words = Words(len(counts), counts.num_bytes)
        needed = self.needed(words)
        if self.options.max_ram is not None:
            self.options.report(f"{words.number:,} unique pretokens: {self.what} takes about {readable(needed)}")
            refuse_beyond(self.options.max_ram, needed, f"{self.what} ({words.number:,} unique pretokens)")
