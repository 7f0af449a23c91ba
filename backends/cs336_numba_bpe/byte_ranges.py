"""Byte ranges of several files, for threads to share. Where files are cut: `cs336_registry/text/byte_ranges.py`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cs336_registry.text.byte_ranges import byte_ranges
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN

from .constants import CL100K, GPT2

_PATTERNS = {GPT2: GPT2_PATTERN, CL100K: CL100K_PATTERN}


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
    tokens = [token.decode() for token in special_tokens]
    return [
        ByteRange(os.fspath(path), begin, end)
        for path in paths
        for begin, end in byte_ranges(Path(path), _PATTERNS[pattern], tokens, range_bytes)
    ]
