"""What a run may take under max_ram, laid out before it begins: how many workers, how many words each may hold, and how
large the table of sums may grow before it goes to disk. A run that can't be kept under it is refused at its start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs336_registry.text.accumulator import BYTES_PER_ENTRY
from cs336_registry.text.byte_ranges import byte_ranges
from cs336_registry.text.inputs import is_plain
from cs336_registry.text.memory import growth, readable, refuse_beyond
from cs336_registry.text.training_cache import WordCounts

from .counting import MOST_WORDS, count_range
from .pair_merger import BASE_BYTES, merging_bytes

WORKER_BYTES = 48 << 20
"""A worker process without words: the interpreter, numpy, regex, blocks of text."""
BYTES_PER_WORD = 350
"""Of a word that is being counted: in two tables, as text and as bytes, and sorted."""
FEWEST_WORDS, FEWEST_ENTRIES = 50_000, 100_000
"""With smaller tables than these, most of the time would go into emptying them."""
LOWEST_BYTES = BASE_BYTES + FEWEST_WORDS * BYTES_PER_WORD + FEWEST_ENTRIES * BYTES_PER_ENTRY
SAMPLE_RANGE_BYTES, SAMPLE_RANGES = 1 << 18, 16
SAMPLED_FROM_BYTES = 4 * SAMPLE_RANGE_BYTES * SAMPLE_RANGES
"""Smaller corpora are counted before a sample of them would have told more."""
UNSURE = 1.25
"""An estimate from a sample refuses only what it passes by this factor; what is counted refuses by itself."""


@dataclass(frozen=True)
class MemoryPlan:
    """The numbers of workers and of words each may hold, and the bytes of the table of sums (None: no bound)."""

    num_workers: int
    most_words: int = MOST_WORDS
    table_bytes: int | None = None


@dataclass(frozen=True)
class Ceiling:
    """max_ram (bytes) of a run that is going to merge the words, or to make a dictionary of them."""

    max_ram: int | None = None
    merging: bool = True
    progress: bool = False

    def plan(self, num_workers: int) -> MemoryPlan:
        if self.max_ram is None:
            return MemoryPlan(num_workers)
        refuse_beyond(self.max_ram, LOWEST_BYTES, "counting")
        left = self.max_ram - BASE_BYTES
        # Half for the words that are being counted, in this process where there is no room for two others.
        most = int(left / 2 / (WORKER_BYTES + FEWEST_WORDS * BYTES_PER_WORD))
        num_workers = min(num_workers, most) if most > 1 else 1
        base = WORKER_BYTES * num_workers if num_workers > 1 else 0
        words = max(FEWEST_WORDS, min(MOST_WORDS, int((left / 2 - base) / num_workers / BYTES_PER_WORD)))
        plan = MemoryPlan(num_workers, words, left - base - num_workers * words * BYTES_PER_WORD)
        self.report(
            f"max_ram = {readable(self.max_ram)}: {num_workers} process{'es' * (num_workers > 1)} of at most "
            f"{words:,} words, sums beyond {readable(plan.table_bytes)} go to disk"
        )
        return plan

    def check_ahead(self, paths: Sequence[Path], special_tokens: Sequence[str], pattern: str) -> None:
        """Refuse, from a sample, what surely won't fit, before anything is counted."""
        found = None if self.max_ram is None else projected(paths, special_tokens, pattern)
        if found is None:
            return
        needed, number = self._needed(*found), f"about {found[0]:,} unique pretokens, from a sample"
        self.report(f"{number}: {self._what} takes about {readable(needed)} of max_ram = {readable(self.max_ram)}")
        if needed > UNSURE * self.max_ram:
            refuse_beyond(self.max_ram, needed, f"{self._what} ({number})")

    def check(self, words: WordCounts) -> None:
        number = len(words.counts)
        refuse_beyond(
            self.max_ram, self._needed(number, len(words.text)), f"{self._what} ({number:,} unique pretokens)"
        )

    def report(self, message: str) -> None:
        if self.progress:
            print(f"heap_bpe: {message}", file=sys.stderr, flush=True)

    @property
    def _what(self) -> str:
        return "merging" if self.merging else "the dictionary of counts"

    def _needed(self, number: int, num_bytes: int) -> int:
        if self.merging:
            return merging_bytes(number, num_bytes)
        return BASE_BYTES + 2 * num_bytes + (12 + BYTES_PER_ENTRY) * number


def projected(paths: Sequence[Path], special_tokens: Sequence[str], pattern: str) -> tuple[int, int] | None:
    """How many unique pretokens a corpus has, and their bytes, by a sample; None where it is small or packed."""
    if not all(map(is_plain, paths)):
        return None
    size = sum(path.stat().st_size for path in paths)
    if size < SAMPLED_FROM_BYTES:
        return None
    ranges = [(path, *cut) for path in paths for cut in byte_ranges(path, pattern, special_tokens, SAMPLE_RANGE_BYTES)]
    chosen = [ranges[index * len(ranges) // SAMPLE_RANGES] for index in range(min(SAMPLE_RANGES, len(ranges)))]
    if sum(end - start for _, start, end in chosen) > SAMPLED_FROM_BYTES:
        return None  # It can't be cut, so a part of it takes as long as the whole.
    half, whole = (
        (
            sum(end - start for _, start, end in part),
            WordCounts.merged(
                count_range(path, start, end, pattern, special_tokens).items() for path, start, end in part
            ),
        )
        for part in (chosen[::2], chosen)
    )
    if not len(half[1].counts):
        return None
    factor = growth(size, (half[0], len(half[1].counts)), (whole[0], len(whole[1].counts)))
    return int(len(whole[1].counts) * factor), int(len(whole[1].text) * factor)
