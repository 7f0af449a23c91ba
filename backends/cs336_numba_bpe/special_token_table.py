"""Special tokens as the arrays that kernels search with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_BYTE_PAIRS = 8
"""With more distinct first two bytes than this, text is searched byte by byte."""
MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class SpecialTokenTable:
    """Tokens grouped by first byte, the longest first. `order[index]` is the place of a token in the caller's list."""

    longest: int
    byte_pairs: np.ndarray
    first_byte_starts: np.ndarray
    token_starts: np.ndarray
    token_bytes: np.ndarray
    order: np.ndarray
    tokens: tuple[bytes, ...]

    @property
    def kernel_arguments(self) -> tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
    first_bytes = np.array([tokens[index][0] for index in order], np.int64)
    pairs = sorted({(token[0], token[1] if len(token) > 1 else -1) for token in tokens})
    return SpecialTokenTable(
        longest=max(lengths, default=0),
        byte_pairs=np.array(pairs if len(pairs) <= MAX_BYTE_PAIRS else [], np.int64).reshape(-1),
        first_byte_starts=np.searchsorted(first_bytes, np.arange(257)).astype(np.int64),
        token_starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
        token_bytes=np.frombuffer(b"".join(tokens[index] for index in order) + b"\0", np.uint8).copy(),
        order=np.array(order, np.int64),
        tokens=tuple(tokens),
    )
