"""Counting pretokens in an open-addressing table of 32-byte slots: two key words, a count, an arena offset.

A pretoken of up to 15 bytes is its own key: its bytes, zeros, and its length in the last byte. A longer one has a hash,
0xFF and its length as key, and its bytes in an arena. 256 pretokens are taken at a time: first all keys are made and
their slots prefetched, then the slots are looked at, so that cache misses overlap.
"""

from __future__ import annotations

from numba import int64, uint64

from ..constants import (
    ARENA_USED,
    BATCH,
    DONE,
    GPT2,
    INLINE_BYTES,
    INVALID,
    LONG,
    MAX_LOAD_DENOMINATOR,
    MAX_LOAD_NUMERATOR,
    NEEDED,
    NEEDS_ARENA,
    NEEDS_TABLE,
    NOT_UTF8,
    STATUS,
    UNIQUE,
)
from .characters import ALL, ONE, ZERO
from .intrinsics import address_of, bit, helper, kernel, load_byte, load_word, prefetch_to_write, store_word
from .scan_cl100k import scan_cl100k
from .scan_gpt2 import scan_gpt2
from .text_pieces import last_safe_cut, next_special_token

MULTIPLIER_1, MULTIPLIER_2 = uint64(0x9E3779B97F4A7C15), uint64(0xC2B2AE3D27D4EB4F)
LENGTH_SHIFT = uint64(56)
LONG_KEY = uint64(LONG << 56)
LENGTH_MASK = uint64((1 << 56) - 1)
KEY_0, KEY_1, COUNT, OFFSET = 0, 1, 2, 3


@helper
def low_bytes(word, count):
    """The lowest `count` bytes of a word, 0 <= count < 8."""
    return word & (bit(count * 8) - ONE)


@helper
def short_key(address, start, length):
    """(key 0, key 1) of a pretoken of 1 to 15 bytes. Lengths change from word to word, so no branch depends on them."""
    in_first = min(length, 8)
    in_second = max(length, 8) - 8
    key_0 = load_word(address, start) & (ALL >> uint64(64 - 8 * in_first))
    key_1 = load_word(address, start + 8) & ((ONE << uint64(8 * in_second)) - ONE)
    return key_0, key_1 | (uint64(length) << LENGTH_SHIFT)


@kernel
def long_key(address, start, length):
    """(key 0, key 1) of a pretoken of 16 bytes or more."""
    digest = uint64(length) * MULTIPLIER_1
    offset = 0
    while offset + 8 <= length:
        digest = (digest ^ load_word(address, start + offset)) * MULTIPLIER_1
        digest ^= digest >> uint64(29)
        offset += 8
    if offset < length:
        digest = (digest ^ low_bytes(load_word(address, start + offset), length - offset)) * MULTIPLIER_2
        digest ^= digest >> uint64(31)
    return digest, LONG_KEY | uint64(length)


@helper
def pretoken_key(address, start, length):
    if length <= INLINE_BYTES:
        return short_key(address, start, length)
    return long_key(address, start, length)


@helper
def key_hash(key_0, key_1):
    digest = (key_0 ^ (key_1 * MULTIPLIER_2)) * MULTIPLIER_1
    return digest ^ (digest >> uint64(32))


@helper
def is_long(key_1):
    return key_1 >> LENGTH_SHIFT == uint64(LONG)


@helper
def key_length(key_1):
    return int64(key_1 & LENGTH_MASK) if is_long(key_1) else int64(key_1 >> LENGTH_SHIFT)


@kernel
def equal_bytes(address, start, other_address, other_start, length):
    offset = 0
    while offset + 8 <= length:
        if load_word(address, start + offset) != load_word(other_address, other_start + offset):
            return False
        offset += 8
    if offset == length:
        return True
    here = load_word(address, start + offset)
    there = load_word(other_address, other_start + offset)
    return low_bytes(here ^ there, length - offset) == ZERO


@helper
def slot_of(key_0, key_1, table):
    return int64(key_hash(key_0, key_1) & uint64(table.shape[0] - 1))


@helper
def has_room(table, unique, more):
    return (unique + more) * MAX_LOAD_DENOMINATOR <= table.shape[0] * MAX_LOAD_NUMERATOR


@kernel
def make_keys(address, start, ends, first, last, table, keys_0, keys_1, slots):
    """Keys and slots of the pretokens first..last-1 of `ends`, the first of which begins at `start`."""
    table_address = address_of(table)
    for index in range(first, last):
        end = ends[index]
        length = end - start
        key_0, key_1 = pretoken_key(address, start, length)
        slot = slot_of(key_0, key_1, table)
        prefetch_to_write(table_address, slot * 32)
        keys_0[index - first], keys_1[index - first], slots[index - first] = key_0, key_1, slot
        start = end
    return start


@helper
def find_slot(address, start, key_0, key_1, slot, table, arena_address):
    """The slot that holds this pretoken, or the free one where it belongs."""
    mask = table.shape[0] - 1
    while True:
        found = table[slot, KEY_1]
        if found == key_1 and table[slot, KEY_0] == key_0:
            if not is_long(key_1):
                return slot
            if equal_bytes(
                address, start, arena_address, int64(table[slot, OFFSET] & LENGTH_MASK), int64(key_1 & LENGTH_MASK)
            ):
                return slot
        if found == ZERO:
            return slot
        slot = (slot + 1) & mask


@helper
def copy_bytes(address, start, length, target, offset):
    for position in range(length):
        target[offset + position] = load_byte(address, start + position)


@kernel
def count_pretokens(address, start, ends, count, table, arena, state, keys_0, keys_1, slots):
    """Count the pretokens of `ends`; returns how many were counted (fewer where the arena is too small: state
    tells)."""
    arena_address = address_of(arena)
    for first in range(0, count, BATCH):
        last = min(count, first + BATCH)
        next_start = make_keys(address, start, ends, first, last, table, keys_0, keys_1, slots)
        for index in range(first, last):
            key_0, key_1 = keys_0[index - first], keys_1[index - first]
            slot = find_slot(address, start, key_0, key_1, slots[index - first], table, arena_address)
            if table[slot, KEY_1] == ZERO:
                if is_long(key_1):
                    length, used = ends[index] - start, state[ARENA_USED]
                    if used + length + 8 > arena.shape[0]:
                        state[STATUS], state[NEEDED] = NEEDS_ARENA, length
                        return index
                    copy_bytes(address, start, length, arena, used)
                    table[slot, OFFSET] = uint64(used)
                    state[ARENA_USED] = used + length
                table[slot, KEY_0], table[slot, KEY_1] = key_0, key_1
                state[UNIQUE] += 1
            table[slot, COUNT] += ONE
            start = ends[index]
        start = next_start
    return count


@helper
def scan(address, start, stop, pattern, classes, ends):
    if pattern == GPT2:
        return scan_gpt2(address, start, stop, classes, ends)
    return scan_cl100k(address, start, stop, classes, ends)


@kernel
def count_block(
    text,
    start,
    stop,
    is_last,
    pattern,
    longest_special_token,
    byte_pairs,
    first_byte_starts,
    token_starts,
    token_bytes,
    classes,
    ends,
    table,
    arena,
    state,
    keys_0,
    keys_1,
    slots,
):
    """Count the pretokens of text[start:stop] as far as they are settled, which is everything where `is_last` is set.

    Returns where to go on. state[STATUS]: DONE; NEEDS_TABLE or NEEDS_ARENA: enlarge and call again from there;
    NOT_UTF8: the text from there on holds bytes that are not UTF-8: replace them and call again.
    """
    address = address_of(text)
    position = start
    state[STATUS] = DONE
    limit = stop if is_last else max(position, stop - max(longest_special_token, 1))
    while position < stop:
        special = -1
        if longest_special_token > 0:
            special = next_special_token(
                address, position, limit, stop, byte_pairs, first_byte_starts, token_starts, token_bytes
            )
        if special >= 0:
            segment_stop = special >> 20
        elif is_last:
            segment_stop = stop
        else:
            segment_stop = last_safe_cut(address, position, limit, pattern, classes)
        while position < segment_stop:
            scanned = scan(address, position, segment_stop, pattern, classes, ends)
            count, outcome = scanned >> 2, scanned & 3
            if not has_room(table, state[UNIQUE], count):
                state[STATUS], state[NEEDED] = NEEDS_TABLE, count
                return position
            counted = count_pretokens(address, position, ends, count, table, arena, state, keys_0, keys_1, slots)
            if counted > 0:
                position = ends[counted - 1]
            if counted < count:
                return position
            if outcome == INVALID:
                state[STATUS] = NOT_UTF8
                return position
        if special >= 0:
            index = special & 0xFFFFF
            position += token_starts[index + 1] - token_starts[index]
        elif not is_last:
            break
    return position


@kernel
def move_table(table, larger):
    """Put every entry of `table` into the empty table `larger`."""
    larger_address, mask = address_of(larger), larger.shape[0] - 1
    for slot in range(table.shape[0]):
        ahead = slot + 16
        if ahead < table.shape[0] and table[ahead, KEY_1] != ZERO:
            prefetch_to_write(larger_address, slot_of(table[ahead, KEY_0], table[ahead, KEY_1], larger) * 32)
        if table[slot, KEY_1] != ZERO:
            target = slot_of(table[slot, KEY_0], table[slot, KEY_1], larger)
            while larger[target, KEY_1] != ZERO:
                target = (target + 1) & mask
            for column in range(4):
                larger[target, column] = table[slot, column]
    return 0


@kernel
def add_table(table, arena, state, other_table, other_arena, first):
    """Add the counts of another table's slots from `first` on, for whose long words `arena` must have room.

    Returns the slot to go on with, which is the last one's successor where all is done: 7/8 of `table` may be taken,
    since words that both tables have would make any estimate too high.
    """
    arena_address, other_address, table_address = address_of(arena), address_of(other_arena), address_of(table)
    most = table.shape[0] // 8 * 7
    for slot in range(first, other_table.shape[0]):
        if state[UNIQUE] >= most:
            return slot
        ahead = slot + 16
        if ahead < other_table.shape[0] and other_table[ahead, KEY_1] != ZERO:
            prefetch_to_write(table_address, slot_of(other_table[ahead, KEY_0], other_table[ahead, KEY_1], table) * 32)
        key_0, key_1 = other_table[slot, KEY_0], other_table[slot, KEY_1]
        if key_1 != ZERO:
            start = int64(other_table[slot, OFFSET])
            target = find_slot(other_address, start, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
            if table[target, KEY_1] == ZERO:
                if is_long(key_1):
                    length, used = int64(key_1 & LENGTH_MASK), state[ARENA_USED]
                    copy_bytes(other_address, start, length, arena, used)
                    table[target, OFFSET] = uint64(used)
                    state[ARENA_USED] = used + length
                table[target, KEY_0], table[target, KEY_1] = key_0, key_1
                state[UNIQUE] += 1
            table[target, COUNT] += other_table[slot, COUNT]
    return other_table.shape[0]


@kernel
def add_words(word_bytes, word_starts, counts, table, arena, state):
    """Add words with their counts. `table` and `arena` must have room for all of them."""
    address, arena_address = address_of(word_bytes), address_of(arena)
    for word in range(counts.shape[0]):
        start, length = word_starts[word], word_starts[word + 1] - word_starts[word]
        key_0, key_1 = pretoken_key(address, start, length)
        slot = find_slot(address, start, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
        if table[slot, KEY_1] == ZERO:
            if is_long(key_1):
                used = state[ARENA_USED]
                copy_bytes(address, start, length, arena, used)
                table[slot, OFFSET] = uint64(used)
                state[ARENA_USED] = used + length
            table[slot, KEY_0], table[slot, KEY_1] = key_0, key_1
            state[UNIQUE] += 1
        table[slot, COUNT] += uint64(counts[word])
    return 0


@kernel
def total_bytes(table):
    """How many bytes the pretokens of a table have together."""
    total = 0
    for slot in range(table.shape[0]):
        if table[slot, KEY_1] != ZERO:
            total += key_length(table[slot, KEY_1])
    return total


@kernel
def list_words(table, arena, hashes, word_bytes, word_starts, counts):
    """Write every entry: its bytes (`word_bytes` needs 16 bytes to spare), their places, counts, and hashes if there
    is room."""
    arena_address, bytes_address = address_of(arena), address_of(word_bytes)
    word = used = 0
    for slot in range(table.shape[0]):
        key_0, key_1 = table[slot, KEY_0], table[slot, KEY_1]
        if key_1 != ZERO:
            word_starts[word] = used
            counts[word] = int64(table[slot, COUNT])
            if hashes.shape[0] > 0:
                hashes[word] = key_hash(key_0, key_1)
            length = key_length(key_1)
            if is_long(key_1):
                copy_bytes(arena_address, int64(table[slot, OFFSET]), length, word_bytes, used)
            else:
                store_word(bytes_address, used, key_0)
                store_word(bytes_address, used + 8, key_1)
            used += length
            word += 1
    word_starts[word] = used
    return word
