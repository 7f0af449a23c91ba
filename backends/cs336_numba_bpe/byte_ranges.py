"""Cutting files into byte ranges that can be read apart, without changing any pretoken.

A range may begin where a cut is safe for the pattern (`kernels/text_pieces.py` says why) and no special token could
stand across it, wherever special tokens before it may lie.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .constants import GPT2

WINDOW_BYTES = 1 << 16
_SAFE_CUTS = {True: re.compile(rb"[!-~](?=[ \n])"), False: re.compile(rb"[!-~](?= )|[A-Za-z0-9](?=\n)")}


@dataclass(frozen=True)
class ByteRange:
    path: str
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin


def cut_into_ranges(
    paths: Sequence[str | os.PathLike[str]], pattern: int, special_tokens: Sequence[bytes], range_bytes: int
) -> list[ByteRange]:
    """Ranges of about `range_bytes` that together are the files, in order; longer ones where there is no safe cut."""
    ranges: list[ByteRange] = []
    for path in map(os.fspath, paths):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = 0
            while size - begin > range_bytes * 3 // 2:
                cut = _first_safe_cut(file.fileno(), begin + range_bytes, pattern, special_tokens)
                if cut is None:
                    break
                ranges.append(ByteRange(path, begin, cut))
                begin = cut
            ranges.append(ByteRange(path, begin, size))
    return ranges


def _first_safe_cut(descriptor: int, offset: int, pattern: int, special_tokens: Sequence[bytes]) -> int | None:
    """The first safe cut in a window that begins at `offset`."""
    longest = max(map(len, special_tokens), default=1)
    base = max(0, offset - longest)
    window = os.pread(descriptor, WINDOW_BYTES + 2 * longest, base)
    for match in _SAFE_CUTS[pattern == GPT2].finditer(window, offset - base, max(offset - base, len(window) - longest)):
        cut = match.end()
        if not any(token in window[max(0, cut - len(token) + 1) : cut + len(token) - 1] for token in special_tokens):
            return base + cut
    return None
