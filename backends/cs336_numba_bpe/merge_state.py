"""Places in the merge engine's `state` and the outcomes of a call."""

from __future__ import annotations

(
    MERGES_DONE,
    NUM_TOKENS,
    NUM_ROWS,
    PAIR_KEYS_USED,
    ARENA_USED,
    HEAP_SIZE,
    THRESHOLD,
    TOKEN_BYTES_USED,
    NEEDED,
    APPLIED,
    RESCANS,
    LENGTH,
    FLOOR,
) = range(13)
STATE_LENGTH = 16

PAUSED, FINISHED, NEEDS_GROWTH = 0, 1, 2
MEASURED, NEGATIVE_COUNT, TOO_MANY_BYTES = 0, 1, 2
HIGHEST = 2**63 - 1

NARROW_SYMBOLS, NARROW_TOKENS = 2**31 - 2**20, 2**16 - 2
"""With this many symbols or tokens, places take 64 bits and symbols 32, instead of 32 and 16."""

BLOCK_SHIFT = 6
BLOCK = 1 << BLOCK_SHIFT
"""Symbols of words that occur equally often."""
TOP_CLASS = 1024
"""Words that occur less often stand together with those that occur as often."""
