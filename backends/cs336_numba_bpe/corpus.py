"""Counting a corpus, by the way that is soonest done: plain Python, compiled on threads, or `regex` for other
patterns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cs336_registry.text.inputs import is_plain
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN

from .compile_cache import is_warm
from .constants import CL100K, GPT2
from .small import count_pretokens

if TYPE_CHECKING:
    from .count_table import WordCounts

COMPILED_PATTERNS = {GPT2_PATTERN: GPT2, CL100K_PATTERN: CL100K}
WARM_BYTES = 300_000
"""Below this size plain Python is done before compiled code is even loaded (about 0.2 s)."""
COLD_BYTES = 8_000_000
"""Below this size plain Python is done before the kernels are compiled (about 15 s)."""


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
    *,
    num_threads: int | None = None,
    max_ram: int | None = None,
    advance: Callable[[int], None] = lambda num_bytes: None,
    report: Callable[[str], None] = lambda message: None,
    small_groups: tuple[str, ...] = ("count",),
) -> WordCounts | dict[bytes, int]:
    """Unique pretokens and their counts: a dictionary from plain Python, arrays from compiled code."""
    if pattern not in COMPILED_PATTERNS or is_small(total_size(paths), small_groups):
        return count_pretokens(paths, special_tokens, pattern)
    from .word_counter import count_words

    return count_words(
        paths, COMPILED_PATTERNS[pattern], special_tokens,
        num_threads=num_threads, max_ram=max_ram, advance=advance, report=report,
    )  # fmt: skip
