"""Counting a corpus by the way that is soonest done.

From the cache, in plain Python, compiled on threads, or by `regex` where the scanner does not know the pattern.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cs336_registry.text.changes import FileStates, file_states, refuse_changed
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import is_plain
from cs336_registry.text.memory import bytes_of
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN
from cs336_registry.text.progress import Progress

from .compile_cache import is_warm
from .constants import CL100K, GPT2
from .small import count_pretokens

if TYPE_CHECKING:
    from cs336_registry.text.training_cache import TrainingCache

    from .count_table import WordCounts

COMPILED_PATTERNS = {GPT2_PATTERN: GPT2, CL100K_PATTERN: CL100K}
WARM_BYTES = 200_000
"""Below this size plain Python is done before compiled code is even loaded (about 0.2 s)."""
COLD_BYTES = 8_000_000
"""Below this size plain Python is done before the kernels are compiled (about 15 s)."""
SHARD_BYTES = 1 << 30
"""With a cache, counts are kept after every so many bytes: what a killed run loses at most."""


@dataclass(frozen=True)
class Options:
    """How to count: threads, cache, memory ceiling (bytes), and whether to report on stderr; and the files' states
    before any was read."""

    num_threads: int | None = None
    cache: TrainingCache | None = None
    max_ram: int | None = None
    progress: bool = False
    states: FileStates = field(default_factory=dict)

    def report(self, message: str) -> None:
        if self.progress:
            print(f"numba_bpe: {message}", file=sys.stderr, flush=True)

    def announce(self, message: str) -> None:
        """Compiling is announced on a terminal too, whoever waits there."""
        if self.progress or sys.stderr.isatty():
            print(message, file=sys.stderr, flush=True)


def make_options(
    paths: Sequence[Path],
    special_tokens: Sequence[str],
    pattern: str,
    num_threads: int | None,
    cache_dir: StrPath | None,
    max_ram: int | str | None,
    progress: bool | None,
) -> Options:
    """Options of a run, checked; the cache is of this corpus, and of none where the input can't be read twice."""
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"num_threads is {num_threads}: it must be at least 1, or None for one per CPU")
    ceiling = bytes_of(max_ram)
    states = file_states(paths)
    cache = None
    if cache_dir is not None:
        from cs336_registry.text.training_cache import TrainingCache, identify

        identity = identify(paths, special_tokens, pattern)
        cache = None if identity is None else TrainingCache(cache_dir, paths, identity)
    return Options(num_threads, cache, ceiling, bool(progress), states)


def is_small(num_bytes: int, groups: tuple[str, ...]) -> bool:
    """Whether plain Python is the faster way for a text of this size."""
    return num_bytes < WARM_BYTES or (num_bytes < COLD_BYTES and not is_warm(groups))


def total_size(paths: Sequence[Path]) -> int:
    """Bytes of text, guessed where files are packed; a pipe counts as large."""
    sizes = (path.stat().st_size * (1 if is_plain(path) else 4) if path.is_file() else COLD_BYTES for path in paths)
    return sum(sizes)


def count_corpus(
    paths: Sequence[Path],
    special_tokens: Sequence[str],
    pattern: str,
    options: Options,
    groups: tuple[str, ...] = ("count",),
    max_tokens: int = 0,
) -> WordCounts | dict[bytes, int]:
    """Unique pretokens and their counts: a dictionary from plain Python, arrays from compiled code.

    groups: the kernels that the caller is going to use, which decide whether compiled code is at hand. max_tokens: of
    the vocabulary to train. Raises MemoryError where what the caller is going to do can't be kept under max_ram: before
    counting where that is clear from a sample, else when the words are counted (and in the cache); ValueError where a
    file changes while it is read.
    """
    size = total_size(paths)
    cache = options.cache
    if pattern not in COMPILED_PATTERNS or is_small(size, groups):
        kept = None if cache is None else cache.load_word_counts()
        if kept is not None:
            return kept.to_dict()
        if options.max_ram is not None and size >= COLD_BYTES:
            raise ValueError("max_ram is kept for the patterns gpt2 and cl100k alone: pass --backend heap_bpe")
        counts = count_pretokens(paths, special_tokens, pattern)
        refuse_changed(options.states, paths)
        if cache is not None:
            from cs336_registry.text.training_cache import WordCounts as KeptCounts

            cache.save_word_counts(KeptCounts.of(counts))
        return counts
    from .memory_estimate import Ceiling
    from .word_counter import WordCounter

    ceiling = Ceiling(options, merging="merge" in groups, max_tokens=max_tokens)
    if cache is not None:
        from .kept_counts import load_words

        words = load_words(cache.load_word_counts())
        if words is not None:
            ceiling.check(words)
            return words
    counter = WordCounter(COMPILED_PATTERNS[pattern], special_tokens, options)
    ceiling.check_ahead(counter, paths)
    with Progress("counting", size, "bytes", enabled=options.progress) as progress:
        words = counter.count(paths, advance=_adder(progress.update))
    refuse_changed(options.states, paths)
    if cache is not None:
        from .kept_counts import save_words

        save_words(cache.save_word_counts, words)
    ceiling.check(words)
    return words


def _adder(update: Callable[[int], None]) -> Callable[[int], None]:
    """Turns "so much more" into "so much altogether"; threads may call it, as a lost update only shows late."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        update(done)

    return advance
