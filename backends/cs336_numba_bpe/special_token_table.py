"""Special tokens as the arrays that kernels search with."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from . import blocks

MAX_BYTE_PAIRS = 8
"""With more distinct first two bytes than this, text is searched byte by byte."""
MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class SpecialTokenTable:
    """Tokens grouped by first byte, the longest first. `order[index]` is the place of a token in the caller's list."""

    longest: int
    byte_pairs: memoryview
    first_byte_starts: memoryview
    token_starts: memoryview
    token_bytes: memoryview
    order: memoryview
    tokens: tuple[bytes, ...]

    @property
    def kernel_arguments(self) -> tuple[int, memoryview, memoryview, memoryview, memoryview]:
        return self.longest, self.byte_pairs, self.first_byte_starts, self.token_starts, self.token_bytes

    @property
    def need_decoded_text(self) -> bool:
        """A token with U+FFFD also matches where that stands for bytes that are not UTF-8."""
        return any("\ufffd".encode() in token for token in self.tokens)


def build_special_token_table(special_tokens: Sequence[str]) -> SpecialTokenTable:
    tokens = [token.encode() for token in special_tokens]
    if len(tokens) >= MAX_TOKENS:
        raise ValueError(f"there are {len(tokens)} special tokens: the compiled scanner takes fewer than {MAX_TOKENS}")
    order = sorted(range(len(tokens)), key=lambda index: (tokens[index][0], -len(tokens[index]), tokens[index]))
    lengths = [len(tokens[index]) for index in order]
    first_bytes = [tokens[index][0] for index in order]
    pairs = sorted({(token[0], token[1] if len(token) > 1 else -1) for token in tokens})
    return SpecialTokenTable(
        longest=max(lengths, default=0),
        byte_pairs=blocks.of("q", itertools.chain(*pairs) if len(pairs) <= MAX_BYTE_PAIRS else ()),
        first_byte_starts=blocks.of("q", (bisect.bisect_left(first_bytes, byte) for byte in range(257))),
        token_starts=blocks.of("q", itertools.accumulate(lengths, initial=0)),
        token_bytes=blocks.of("B", b"".join(tokens[index] for index in order) + b"\0"),
        order=blocks.of("q", order),
        tokens=tuple(tokens),
    )
