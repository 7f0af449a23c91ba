"""Cutting a file into byte ranges that can be counted alone: no pretoken and no special token crosses a cut.

A cut lies between a visible ASCII character and a space or a newline: no pretoken of GPT-2's pattern has these inside,
and no UTF-8 sequence, sound or broken, goes on across two ASCII bytes. In cl100k's pattern newlines belong to the
punctuation before them, so there only a letter or a digit may come before one. For any other pattern a cut lies at the
end of a special token. Ranges do not depend on the number of workers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from .patterns import CL100K_PATTERN, GPT2_PATTERN

WINDOW = 1 << 12
_SAFE = {
    GPT2_PATTERN: re.compile(rb"[!-~](?=[ \n])"),
    CL100K_PATTERN: re.compile(rb"[!-~](?= )|[0-9A-Za-z](?=\n)"),
}
_REPLACEMENT_CHARACTER = "\ufffd"

FindCut = Callable[[bytes, int, int, Sequence[bytes]], int | None]


def byte_ranges(path: Path, pattern: str, special_tokens: Sequence[str], range_bytes: int) -> list[tuple[int, int]]:
    """The file as (start, end) ranges of about `range_bytes`, in order; longer ones where there is no safe cut."""
    size = path.stat().st_size
    # Broken UTF-8 may decode to the replacement character, so such a token can't be looked for among bytes.
    if size <= range_bytes or any(_REPLACEMENT_CHARACTER in token for token in special_tokens):
        return [(0, size)]
    tokens = [token.encode() for token in special_tokens]
    find_cut = partial(_safe_place, _SAFE[pattern]) if pattern in _SAFE else _end_of_special_token
    cuts = [0]
    with open(path, "rb") as file:
        while cuts[-1] + range_bytes < size:
            cut = _first_cut(file, cuts[-1] + range_bytes, size, tokens, find_cut)
            if cut is None or cut >= size:
                break
            cuts.append(cut)
    return list(zip(cuts, [*cuts[1:], size], strict=True))


def _first_cut(file: IO[bytes], offset: int, size: int, tokens: Sequence[bytes], find_cut: FindCut) -> int | None:
    """The first cut after `offset`; the window grows until it holds one."""
    margin = 2 * max(map(len, tokens), default=1)
    window = WINDOW + 2 * margin
    start = max(0, offset - margin)
    while True:
        file.seek(start)
        content = file.read(window)
        # A token that begins near the window's end may go on beyond it, unless the file ends there.
        reach = len(content) if start + len(content) >= size else len(content) - margin
        cut = find_cut(content, offset - start, reach, tokens)
        if cut is not None:
            return start + cut
        if start + len(content) >= size:
            return None
        window *= 2


def _safe_place(safe: re.Pattern[bytes], content: bytes, begin: int, reach: int, tokens: Sequence[bytes]) -> int | None:
    for match in safe.finditer(content, begin, reach):
        cut = match.end()
        # Any occurrence in the slice has bytes on both sides of the cut.
        if not any(token in content[max(0, cut - len(token) + 1) : cut + len(token) - 1] for token in tokens):
            return cut
    return None


def _end_of_special_token(content: bytes, begin: int, reach: int, tokens: Sequence[bytes]) -> int | None:
    """The end of a special token that is surely matched: none in its way starts earlier, or as early and is longer."""
    places = sorted((start, start + len(token)) for token in tokens for start in _occurrences(content, token))
    for start, end in places:
        if start < begin or end > reach:
            continue
        rivals = (other for other in places if other != (start, end) and other[0] <= start < other[1])
        if all(other[0] == start and other[1] < end for other in rivals):
            return end
    return None


def _occurrences(content: bytes, token: bytes) -> Iterator[int]:
    start = content.find(token)
    while start >= 0:
        yield start
        start = content.find(token, start + 1)
