"""Numbers that kernels and their callers share: outcomes, patterns and the places of running values in `state`
arrays."""

from __future__ import annotations

SCANNED, FULL, INVALID = 0, 1, 2
"""Outcomes of a scan: all done; the output array is full; bytes that are not UTF-8."""

DONE, NEEDS_TABLE, NEEDS_ARENA, NOT_UTF8, NEEDS_OUTPUT, NEEDS_SCRATCH, MISSING_BYTE = 0, 1, 2, 3, 4, 5, 6
"""Outcomes of a kernel: finished, or what its caller has to enlarge or repair before calling again."""

GPT2, CL100K = 0, 1
"""Patterns that the compiled scanner knows."""

STATUS, NEEDED, UNIQUE, ARENA_USED, IDS_USED, OUTPUT_USED, SHORT_UP_TO = 0, 1, 2, 3, 4, 5, 6
"""Places in the `state` of a table: the last outcome, how much was missing (or which byte), entries, bytes and ids in
its arenas, ids written, bytes of the longest pretoken that is merged as a short one."""
STATE_LENGTH = 8

PADDING = 192
"""Bytes that must be readable after the end of every text buffer."""

BATCH = 256
"""Pretokens that are counted or encoded at a time, step by step, so that cache misses overlap."""
BATCH_WORDS = 5 * BATCH
"""An encoder's memory for them."""

SIDE_BY_SIDE, SIDE_WORDS = 8, 168
"""New pretokens that are merged at a time, and the memory for each of them."""
SCRATCH_WORDS = 2 * BATCH_WORDS + SIDE_BY_SIDE * SIDE_WORDS
"""Memory of an encoder: two batches and the pretokens that are merged side by side."""

INLINE_BYTES = 15
"""Pretokens up to this length live in their table slot; longer ones are hashed and keep their bytes in the arena."""
LONG = 0xFF
"""The length byte of a slot whose pretoken is longer than that."""

MAX_LOAD_NUMERATOR, MAX_LOAD_DENOMINATOR = 5, 8
"""Tables grow when more than 5/8 of their slots are taken."""

MAX_CACHED_BYTES = 4096
"""Longer pretokens are merged every time they occur."""
SHORT_WORD = 64
"""Up to this many bytes a pretoken is merged by looking through its pairs, longer ones with a heap. So are all where a
merge makes a pair that comes before it, as no trainer's do."""
