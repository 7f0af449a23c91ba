"""Counting pretokens with the compiled scanner."""

from __future__ import annotations

from collections.abc import Sequence

from cs336_registry.components.pretoken_counter import check
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath
from cs336_registry.text.patterns import GPT2_PATTERN

from .corpus import count_corpus, make_options


def pretoken_counter(
    input_path: InputPath,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    num_threads: int | None = None,
    cache_dir: StrPath | None = None,
    max_ram: int | str | None = None,
    progress: bool | None = None,
) -> dict[bytes, int]:
    """See the contract. GPT-2's and cl100k's patterns are compiled, any other runs through `regex`.

    num_threads: None for one per CPU of this process. cache_dir: a folder for counts that a later run takes over; None
    keeps nothing. max_ram: bytes, or a string such as "2GB"; tables that outgrow it go to disk (the result itself is a
    dictionary in memory). progress: True reports on stderr.
    """
    paths, tokens = check(input_path, special_tokens, pattern)
    options = make_options(paths, tokens, pattern, num_threads, cache_dir, max_ram, progress)
    counts = count_corpus(paths, tokens, pattern, options)
    return counts if isinstance(counts, dict) else counts.to_dict()
