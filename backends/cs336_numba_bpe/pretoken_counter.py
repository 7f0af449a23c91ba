"""Counting pretokens with the compiled scanner."""

from __future__ import annotations

from collections.abc import Sequence

from cs336_registry.components.pretoken_counter import check
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath
from cs336_registry.text.patterns import GPT2_PATTERN

from .corpus import count_corpus


def pretoken_counter(
    input_path: InputPath,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    num_threads: int | None = None,
    cache_dir: StrPath | None = None,
    max_ram: int | None = None,
    progress: bool | None = None,
) -> dict[bytes, int]:
    """See the contract. GPT-2's and cl100k's patterns are compiled, any other runs through `regex`.

    num_threads: default, one for each CPU this process may use. cache_dir: where counts and compiled code are kept.
    max_ram: bytes; counts beyond it go to disk. progress: report on stderr; None, on a terminal.
    """
    paths, tokens = check(input_path, special_tokens, pattern)
    counts = count_corpus(paths, tokens, pattern, num_threads=num_threads, max_ram=max_ram)
    return counts if isinstance(counts, dict) else counts.to_dict()
