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
) = range(12)
STATE_LENGTH = 16

PAUSED, FINISHED, NEEDS_GROWTH = 0, 1, 2

NARROW_SYMBOLS, NARROW_TOKENS = 2**31 - 2**20, 2**16 - 2
"""With this many symbols or tokens, places take 64 bits and symbols 32, instead of 32 and 16."""
