"""From a pair of tokens to its row: an open-addressing table of keys beside row numbers."""

from __future__ import annotations

from numba import int64, uint64

from .intrinsics import helper, kernel

NO_KEY = uint64(0xFFFFFFFFFFFFFFFF)
LOW_HALF = uint64(0xFFFFFFFF)
MULTIPLIER = uint64(0x9E3779B97F4A7C15)


@helper
def pair_key(left, right):
    return (uint64(left) << uint64(32)) | uint64(right)


@helper
def left_of(key):
    return int64(key >> uint64(32))


@helper
def right_of(key):
    return int64(key & LOW_HALF)


@helper
def pair_slot(key, keys):
    digest = key * MULTIPLIER
    return int64((digest ^ (digest >> uint64(32))) & uint64(keys.shape[0] - 1))


@kernel
def find_row(key, keys, rows):
    """The row of a pair, or -1."""
    mask = keys.shape[0] - 1
    slot = pair_slot(key, keys)
    while True:
        if keys[slot] == key:
            return int64(rows[slot])
        if keys[slot] == NO_KEY:
            return -1
        slot = (slot + 1) & mask


@helper
def put_row(key, row, keys, rows):
    mask = keys.shape[0] - 1
    slot = pair_slot(key, keys)
    while keys[slot] != NO_KEY:
        slot = (slot + 1) & mask
    keys[slot] = key
    rows[slot] = row


@kernel
def move_pairs(keys, rows, larger_keys, larger_rows):
    """Put every pair into larger arrays, whose keys are all NO_KEY."""
    for slot in range(keys.shape[0]):
        if keys[slot] != NO_KEY:
            put_row(keys[slot], rows[slot], larger_keys, larger_rows)
    return 0
