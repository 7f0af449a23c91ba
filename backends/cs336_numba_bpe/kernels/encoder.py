"""Encoding: pretokens to token ids, with two tables of those that were met before.

`table` is the counter's (32-byte slots); the last two words of a slot hold ids: up to seven 16-bit ids or three wider
ones of a short pretoken, in the order of the output but for the first word's top, which holds their number. Both words
are written out whatever they hold, the second over that number, and the output goes on behind the last id. Where there
are more ids, or the pretoken is long, the top byte is 0xFF and the first word is a place in the arena of ids, where
their number comes first; a long pretoken's bytes are where the second word says.

`quick` holds the most frequent pretokens of up to seven bytes, which most of a text consists of, in 16-byte slots: the
bytes and their number, and the first word of ids if that is all. Each pretoken has one place there; the first one to
come keeps it.

256 pretokens are taken at a time. First all are looked for in `quick`, eight at once; then those that were not there
in `table`; then ids are written. Everything that is about to be read is asked for a step ahead, so that cache misses
overlap.

A pretoken that is new is merged as the contract says: the pair that comes first in `merges` is joined wherever it
stands, from left to right, before the next pair is looked for. `merge_table` holds pair, then rank and result, by
open addressing.
"""

from __future__ import annotations

from numba import int64, uint64

from ..constants import (
    ARENA_USED,
    BATCH,
    BATCH_WORDS,
    DONE,
    IDS_USED,
    INVALID,
    LONG,
    MAX_CACHED_BYTES,
    MISSING_BYTE,
    NEEDED,
    NEEDS_ARENA,
    NEEDS_OUTPUT,
    NEEDS_SCRATCH,
    NEEDS_TABLE,
    NOT_UTF8,
    OUTPUT_USED,
    SHORT_UP_TO,
    SHORT_WORD,
    SIDE_BY_SIDE,
    SIDE_WORDS,
    STATUS,
    UNIQUE,
)
from .characters import ALL, ONE, ZERO
from .count_table import (
    KEY_0,
    KEY_1,
    LENGTH_MASK,
    LENGTH_SHIFT,
    MULTIPLIER_1,
    OFFSET,
    copy_bytes,
    find_slot,
    has_room,
    is_long,
    key_hash,
    pretoken_key,
    scan,
    slot_of,
)
from .eight_words import (
    equal_lanes,
    gather,
    load_eight,
    minimum,
    nonzero_lanes,
    preceding,
    smallest,
    spread,
    store_eight,
)
from .intrinsics import (
    address_of,
    bit,
    helper,
    highest_bit,
    kernel,
    load_byte,
    load_word,
    lowest_bit,
    not_inlined,
    number_of_bits,
    prefetch_to_read,
    select,
    store_set_bits,
    store_uint16,
    store_uint32,
    store_word,
)
from .pair_table import NO_KEY, pair_key, pair_slot
from .text_pieces import last_safe_cut, next_special_token

VALUE_0, VALUE_1 = 2, 3
NO_MERGE = int64(1 << 62)
IN_ARENA = uint64(LONG << 56)
NOWHERE = SHORT_WORD
"""The place before the first id of a short pretoken and behind the last one, where NO_ID is, which no pair has."""
NO_ID = uint64(0xFFFFFFFE)
WORK_MERGES, WORK_LEFT, WORK_LENGTH, WORK_LANE, WORK_BYTES = 640, 1280, 1288, 1296, 8 * SIDE_WORDS
"""Memory of a pretoken that is merged beside others: ids, pairs, the bits of those left, its length and number."""
QUICK_BYTES = 7
KEYS_0, KEYS_1, PLACES, MISSING, UNSETTLED = 0, 8 * BATCH, 16 * BATCH, 24 * BATCH, 32 * BATCH + 8 * 64
NUMBER_MISSING, BATCH_BYTES = UNSETTLED + BATCH // 8, 8 * BATCH_WORDS
"""Where in the memory of a batch its arrays begin: for each pretoken both words of the key (the first one is that of
`quick` while it is looked for there) and the address of its ids; the numbers of those that are not in `quick`, with
room for the words that mean nothing behind them; a bit for each of those that have no ids in `table`'s slots; how many
are not in `quick`."""


@helper
def find_merge(left, right, merge_table):
    """rank * 2**32 + result of a pair, or NO_MERGE. Whether a pair is there is as good as random, so that no branch
    depends on it."""
    key = pair_key(left, right)
    bucket = pair_slot(key, merge_table)
    while True:
        address = address_of(merge_table) + 128 * bucket
        lanes = equal_lanes(load_eight(address, 0), key)
        if lanes | uint64(load_word(address, 56) == NO_KEY) != ZERO:
            found = int64(load_word(address + 64, 8 * (lowest_bit(lanes) & 7)))
            return select(lanes != ZERO, found, NO_MERGE)
        bucket = (bucket + 1) & (merge_table.shape[0] - 1)


@kernel
def put_merges(left, right, ranks, results, merge_table):
    """Fill a merge table without pairs; one that comes again takes the later rank."""
    for index in range(left.shape[0]):
        key = pair_key(left[index], right[index])
        bucket, lane = pair_slot(key, merge_table), 0
        while merge_table[bucket, lane] != NO_KEY and merge_table[bucket, lane] != key:
            lane += 1
            if lane == 8:
                bucket, lane = (bucket + 1) & (merge_table.shape[0] - 1), 0
        merge_table[bucket, lane] = key
        merge_table[bucket, lane + 8] = (uint64(ranks[index]) << uint64(32)) | uint64(results[index])
    return 0


@helper
def join_best(ids, merges, count, left, merge_table):
    """Join the first of the best pairs of a short pretoken; returns which ids are left then, or all that were where no
    pair is left. ids and merges are addresses: of `count` ids that stay where they are, and of what each makes with the
    next one that is left."""
    least = load_eight(merges, 0)
    for index in range(8, count - 1, 8):
        least = minimum(least, load_eight(merges, 8 * index))
    best = smallest(least)
    if best == NO_MERGE:
        return left
    place = 0
    lanes = equal_lanes(load_eight(merges, 0), uint64(best))
    while lanes == ZERO:
        place += 8
        lanes = equal_lanes(load_eight(merges, 8 * place), uint64(best))
    place += lowest_bit(lanes)
    joined = lowest_bit(left & ~(bit(place + 1) - ONE))
    left &= ~bit(joined)
    after = lowest_bit(left & ~(bit(place + 1) - ONE))
    before = highest_bit(left & (bit(place) - ONE))
    before = select(before < 0, NOWHERE, before)
    token = best & int64(0xFFFFFFFF)
    store_word(ids, 8 * place, uint64(token))
    store_word(merges, 8 * joined, uint64(NO_MERGE))
    store_word(merges, 8 * place, uint64(find_merge(token, load_word(ids, 8 * after), merge_table)))
    store_word(merges, 8 * before, uint64(find_merge(load_word(ids, 8 * before), token, merge_table)))
    return left


@helper
def compact(ids, left):
    """Move the ids that are left together; returns how many there are."""
    number = 0
    while left != ZERO:
        store_word(ids, 8 * number, load_word(ids, 8 * lowest_bit(left)))
        number += 1
        left &= left - ONE
    return number


@kernel
def split_short(address, start, length, byte_ids, byte_merges, ids, merges):
    """The ids of a short pretoken's bytes, and what pairs of them make; False where a byte has none."""
    before = load_byte(address, start)
    store_word(ids, 8 * NOWHERE, NO_ID)
    store_word(ids, 0, uint64(byte_ids[before]))
    complete = byte_ids[before] >= 0
    for offset in range(1, length):
        byte = load_byte(address, start + offset)
        store_word(ids, 8 * offset, uint64(byte_ids[byte]))
        complete &= byte_ids[byte] >= 0
        store_word(merges, 8 * offset - 8, uint64(byte_merges[before * 256 + byte]))
        before = byte
    store_eight(merges, 8 * length - 8, spread(uint64(NO_MERGE)))
    return complete


@kernel
def merge_short(address, start, length, byte_ids, byte_merges, merge_table, ids, merges):
    """Write the ids of a pretoken of at most 64 bytes to `ids`, an address; returns how many, or -1 for a byte that has
    no id. As no merge makes a pair that comes before it, the first of the best pairs is joined each time."""
    if not split_short(address, start, length, byte_ids, byte_merges, ids, merges):
        return -1
    now, left = ALL >> uint64(64 - length), ZERO
    while now != left:
        left = now
        now = join_best(ids, merges, length, left, merge_table)
    return compact(ids, left)


@kernel
def merge_side_by_side(number, work, merge_table):
    """Merge several short pretokens step by step in turn: each step waits for memory, but not for the other ones."""
    not_inlined()
    active = bit(number) - ONE
    while active != ZERO:
        remaining = active
        while remaining != ZERO:
            word = lowest_bit(remaining)
            remaining &= remaining - ONE
            ids = work + WORK_BYTES * word
            left = load_word(ids, WORK_LEFT)
            now = join_best(ids, ids + WORK_MERGES, int64(load_word(ids, WORK_LENGTH)), left, merge_table)
            store_word(ids, WORK_LEFT, now)
            if now == left:
                active &= ~bit(word)
    return 0


@helper
def push(entry, size, heap):
    place = size
    while place > 0 and entry < heap[(place - 1) >> 1]:
        heap[place] = heap[(place - 1) >> 1]
        place = (place - 1) >> 1
    heap[place] = entry
    return size + 1


@kernel
def pop(size, heap):
    """Take the top off a min-heap of `size` entries; returns the new size."""
    size -= 1
    entry = heap[size]
    place = 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= entry:
            break
        heap[place] = heap[child]
        place = child
    heap[place] = entry
    return size


@kernel
def merge_long(count, ids, following, preceding, heap, batch, merge_table):
    """Merge ids[:count] in place with a linked list and a heap of (rank, place): n log n for n bytes."""
    size = 0
    for index in range(count):
        following[index], preceding[index] = index + 1, index - 1
        if index + 1 < count:
            found = find_merge(ids[index], ids[index + 1], merge_table)
            if found != NO_MERGE:
                size = push(((found >> 32) << 32) | index, size, heap)
    while size > 0:
        rank = heap[0] >> 32
        in_batch = 0
        while size > 0 and heap[0] >> 32 == rank:
            batch[in_batch] = heap[0] & int64(0xFFFFFFFF)
            in_batch += 1
            size = pop(size, heap)
        for entry in range(in_batch):
            place = batch[entry]
            after = following[place]
            if ids[place] < 0 or after >= count:
                continue
            found = find_merge(ids[place], ids[after], merge_table)
            if found == NO_MERGE or found >> 32 != rank:
                continue
            ids[place] = found & int64(0xFFFFFFFF)
            ids[after] = -1
            following[place] = following[after]
            if following[place] < count:
                preceding[following[place]] = place
                found = find_merge(ids[place], ids[following[place]], merge_table)
                if found != NO_MERGE:
                    size = push(((found >> 32) << 32) | place, size, heap)
            before = preceding[place]
            if before >= 0:
                found = find_merge(ids[before], ids[place], merge_table)
                if found != NO_MERGE:
                    size = push(((found >> 32) << 32) | before, size, heap)
    left = place = 0
    while place < count:
        ids[left] = ids[place]
        left += 1
        place = following[place]
    return left


@kernel
def merge_word(
    address, start, length, byte_ids, byte_merges, merge_table, state, ids, following, preceding, heap, batch
):
    """Write the ids of a pretoken to `ids`; returns how many, or -1 for a byte that has no id (state[NEEDED])."""
    if length <= state[SHORT_UP_TO]:
        count = merge_short(
            address, start, length, byte_ids, byte_merges, merge_table, address_of(ids), address_of(following)
        )
        if count >= 0:
            return count
    for offset in range(length):
        byte = load_byte(address, start + offset)
        ids[offset] = byte_ids[byte]
        if byte_ids[byte] < 0:
            state[STATUS], state[NEEDED] = MISSING_BYTE, byte
            return -1
    return merge_long(length, ids, following, preceding, heap, batch, merge_table)


@helper
def write_id(address, place, narrow, token):
    if narrow:
        store_uint16(address, 2 * place, token)
    else:
        store_uint32(address, 4 * place, token)


@helper
def quick_place(key, quick):
    """The offset of a short pretoken's only place in `quick`."""
    bits = lowest_bit(uint64(quick.shape[0] - 1))
    return int64(((key * MULTIPLIER_1) >> uint64(64 - bits)) << uint64(4))


@kernel
def remember(address, start, length, key_0, key_1, slot, count, ids, quick, table, arena, ids_arena, state, narrow):
    """Put a pretoken and its ids into a free slot; both arenas must have room."""
    table[slot, KEY_0], table[slot, KEY_1] = key_0, key_1
    state[UNIQUE] += 1
    bits, in_first = (16, 3) if narrow else (32, 1)
    if (count + 1) * bits <= 128 and not is_long(key_1):
        value_0, value_1 = uint64(count) << LENGTH_SHIFT, ZERO
        for place in range(count):
            if place < in_first:
                value_0 |= uint64(ids[place]) << uint64(place * bits)
            else:
                value_1 |= uint64(ids[place]) << uint64((place - in_first) * bits)
        table[slot, VALUE_0], table[slot, VALUE_1] = value_0, value_1
        if length <= QUICK_BYTES and count <= in_first:
            place = address_of(quick) + quick_place(key_0 | key_1, quick)
            if load_word(place, 0) == ZERO:
                store_word(place, 0, key_0 | key_1)
                store_word(place, 8, value_0)
        return
    used = state[IDS_USED]
    ids_arena[used] = count
    for index in range(count):
        ids_arena[used + 1 + index] = ids[index]
    state[IDS_USED] = used + 1 + count
    table[slot, VALUE_0] = IN_ARENA | uint64(used)
    if is_long(key_1):
        bytes_used = state[ARENA_USED]
        copy_bytes(address, start, length, arena, bytes_used)
        table[slot, OFFSET] = uint64(bytes_used)
        state[ARENA_USED] = bytes_used + length


@helper
def arenas_have_room(length, arena, ids_arena, state):
    return state[ARENA_USED] + length + 8 <= arena.shape[0] and state[IDS_USED] + length + 1 <= ids_arena.shape[0]


@kernel
def encode_words(
    word_bytes, word_starts, quick, table, arena, ids_arena, state,
    merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch, narrow,
):  # fmt: skip
    """Put words into the table ahead of their first use. Everything must have room; words with missing bytes are left
    out."""
    address, arena_address = address_of(word_bytes), address_of(arena)
    for word in range(word_starts.shape[0] - 1):
        start, length = word_starts[word], word_starts[word + 1] - word_starts[word]
        if length == 0 or length > MAX_CACHED_BYTES:
            continue
        key_0, key_1 = pretoken_key(address, start, length)
        slot = find_slot(address, start, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
        if table[slot, KEY_1] == ZERO:
            count = merge_word(
                address, start, length, byte_ids, byte_merges, merge_table, state, ids, following, preceding, heap,
                batch,
            )  # fmt: skip
            if count > 0:
                remember(
                    address,
                    start,
                    length,
                    key_0,
                    key_1,
                    slot,
                    count,
                    ids,
                    quick,
                    table,
                    arena,
                    ids_arena,
                    state,
                    narrow,
                )
    return 0


@kernel
def merge_words(
    word_bytes, word_starts, merge_table, byte_ids, byte_merges, state, ids, following, preceding, heap, batch, found,
    id_starts,
):  # fmt: skip
    """Write the ids of each word to `found`, which has room for one a byte; none for words with missing bytes."""
    address = address_of(word_bytes)
    used = 0
    for word in range(word_starts.shape[0] - 1):
        id_starts[word] = used
        start, length = word_starts[word], word_starts[word + 1] - word_starts[word]
        count = merge_word(
            address, start, length, byte_ids, byte_merges, merge_table, state, ids, following, preceding, heap, batch
        )
        for index in range(count):
            found[used] = ids[index]
            used += 1
    id_starts[word_starts.shape[0] - 1] = used
    return used


@kernel
def put_words(word_bytes, word_starts, word_ids, id_starts, quick, table, arena, ids_arena, state, ids, narrow):
    """Put words whose ids are known into the table; everything must have room."""
    address, arena_address = address_of(word_bytes), address_of(arena)
    for word in range(word_starts.shape[0] - 1):
        start, length = word_starts[word], word_starts[word + 1] - word_starts[word]
        count = id_starts[word + 1] - id_starts[word]
        key_0, key_1 = pretoken_key(address, start, length)
        slot = find_slot(address, start, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
        if table[slot, KEY_1] == ZERO and count > 0:
            for index in range(count):
                ids[index] = word_ids[id_starts[word] + index]
            remember(
                address, start, length, key_0, key_1, slot, count, ids, quick, table, arena, ids_arena, state, narrow
            )
    return 0


@kernel
def look_up_quick(address, start, ends_address, count, quick, batch_address):
    """Look for `count` pretokens in `quick`, eight at a time, the first of which begins at `start`; list those that are
    not there. Returns how many are listed. Up to seven more ends must follow each other."""
    not_inlined()
    quick_address, shift = address_of(quick), uint64(64 - lowest_bit(uint64(quick.shape[0] - 1)))
    before = spread(uint64(start))
    for index in range(0, count, 8):
        ends = load_eight(ends_address, 8 * index)
        starts = preceding(before, ends)
        before = ends
        # A length of 8 stands for all that are no shorter: no key in `quick` has that bit in its last byte.
        lengths = minimum(ends - starts, spread(uint64(8)))
        mask = spread(ALL) >> (spread(uint64(64)) - (lengths << spread(uint64(3))))
        key = (gather(address, starts) & mask) | (lengths << spread(LENGTH_SHIFT))
        places = ((key * spread(MULTIPLIER_1)) >> spread(shift)) << spread(uint64(4))
        store_eight(batch_address + KEYS_0, 8 * index, key)
        store_eight(batch_address + PLACES, 8 * index, places)
    for index in range(0, (count + 7) & ~7):
        prefetch_to_read(quick_address, int64(load_word(batch_address + PLACES, 8 * index)))
    missing = 0
    for first in range(0, count, 64):
        absent = ZERO
        for index in range(first, min(first + 64, count), 8):
            places = load_eight(batch_address + PLACES, 8 * index)
            found = gather(quick_address, places)
            store_eight(batch_address + PLACES, 8 * index, places + spread(uint64(quick_address + 8)))
            absent |= nonzero_lanes(found ^ load_eight(batch_address + KEYS_0, 8 * index)) << uint64(index - first)
        if count - first < 64:
            absent &= bit(count - first) - ONE
        store_word(batch_address + UNSETTLED, first >> 3, ZERO)
        store_set_bits(batch_address + MISSING + 8 * missing, first, absent)
        missing += number_of_bits(absent)
    return missing


@helper
def begin_of(lane, start, ends_address):
    """Where a pretoken of a batch begins, the first of which begins at `start`."""
    return start if lane == 0 else int64(load_word(ends_address, 8 * lane - 8))


@kernel
def ask_table(address, start, ends_address, missing, table, batch_address):
    """Make the keys of the pretokens that are listed, and ask for their slots in `table`."""
    not_inlined()
    table_address, mask = address_of(table), uint64(table.shape[0] - 1)
    for entry in range(missing):
        lane = int64(load_word(batch_address + MISSING, 8 * entry))
        begin = begin_of(lane, start, ends_address)
        key_0, key_1 = pretoken_key(address, begin, int64(load_word(ends_address, 8 * lane)) - begin)
        place = table_address + 32 * int64(key_hash(key_0, key_1) & mask)
        prefetch_to_read(place, 0)
        store_word(batch_address + KEYS_0, 8 * lane, key_0)
        store_word(batch_address + KEYS_1, 8 * lane, key_1)
        store_word(batch_address + PLACES, 8 * lane, uint64(place))
    store_word(batch_address, NUMBER_MISSING, uint64(missing))
    return 0


@kernel
def look_up_table(table, arena, ids_arena, batch_address):
    """Look for the pretokens that are listed in `table`; set a bit for those which are not there, or whose ids are in
    the arena."""
    not_inlined()
    table_address = address_of(table)
    arena_address, ids_address = address_of(arena), address_of(ids_arena)
    missing = int64(load_word(batch_address, NUMBER_MISSING))
    for entry in range(missing):
        lane = int64(load_word(batch_address + MISSING, 8 * entry))
        key_0 = load_word(batch_address + KEYS_0, 8 * lane)
        key_1 = load_word(batch_address + KEYS_1, 8 * lane)
        place = int64(load_word(batch_address + PLACES, 8 * lane))
        while load_word(place, 8) != ZERO and (load_word(place, 0) ^ key_0) | (load_word(place, 8) ^ key_1) != ZERO:
            place = table_address + ((place + 32 - table_address) & (32 * table.shape[0] - 1))
        value = load_word(place, 8 * VALUE_0)
        store_word(batch_address + PLACES, 8 * lane, uint64(place + 8 * VALUE_0))
        if load_word(place, 8) == ZERO or value >= IN_ARENA:
            bits = load_word(batch_address + UNSETTLED, (lane >> 6) * 8) | bit(lane & 63)
            store_word(batch_address + UNSETTLED, (lane >> 6) * 8, bits)
            prefetch_to_read(ids_address, 4 * int64(value & LENGTH_MASK))
            prefetch_to_read(arena_address, int64(load_word(place, 8 * OFFSET)))
    return 0


@kernel
def put_new_words(
    address, start, ends_address, number, batch_address, work, quick, table, arena, ids_arena, state,
    merge_table, ids, narrow,
):  # fmt: skip
    """Merge `number` pretokens side by side and put them into the table; those whose ids are in their slots then are
    settled."""
    arena_address = address_of(arena)
    merge_side_by_side(number, work, merge_table)
    for index in range(number):
        word = work + WORK_BYTES * index
        lane, length = int64(load_word(word, WORK_LANE)), int64(load_word(word, WORK_LENGTH))
        begin = begin_of(lane, start, ends_address)
        key_0, key_1 = load_word(batch_address + KEYS_0, 8 * lane), load_word(batch_address + KEYS_1, 8 * lane)
        slot = find_slot(address, begin, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
        if table[slot, KEY_1] == ZERO:
            if not arenas_have_room(length, arena, ids_arena, state):
                break
            found = compact(word, load_word(word, WORK_LEFT))
            for place in range(found):
                ids[place] = int64(load_word(word, 8 * place))
            remember(
                address, begin, length, key_0, key_1, slot, found, ids, quick, table, arena, ids_arena, state, narrow
            )
        if table[slot, VALUE_0] < IN_ARENA:
            settled = address_of(table) + 32 * slot + 8 * VALUE_0
            store_word(batch_address + PLACES, 8 * lane, uint64(settled))
            bits = load_word(batch_address + UNSETTLED, (lane >> 6) * 8) & ~bit(lane & 63)
            store_word(batch_address + UNSETTLED, (lane >> 6) * 8, bits)
    return 0


@kernel
def encode_new_words(
    address, start, ends_address, count, batch_address, work, quick, table, arena, ids_arena, state,
    merge_table, byte_ids, byte_merges, ids, narrow,
):  # fmt: skip
    """Merge pretokens of a batch that are not in the table and put them there, but for those that `encode_new` is for:
    longer ones, those with bytes that have no id, and those that there is no room for."""
    not_inlined()
    number = 0
    for first in range(0, count, 64):
        lanes = load_word(batch_address + UNSETTLED, first >> 3)
        while lanes != ZERO:
            lane = first + lowest_bit(lanes)
            lanes &= lanes - ONE
            begin = begin_of(lane, start, ends_address)
            length = int64(load_word(ends_address, 8 * lane)) - begin
            place = int64(load_word(batch_address + PLACES, 8 * lane)) - 8 * VALUE_0
            if length > state[SHORT_UP_TO] or load_word(place, 8 * KEY_1) != ZERO:
                continue
            word = work + WORK_BYTES * number
            if split_short(address, begin, length, byte_ids, byte_merges, word, word + WORK_MERGES):
                store_word(word, WORK_LEFT, ALL >> uint64(64 - length))
                store_word(word, WORK_LENGTH, uint64(length))
                store_word(word, WORK_LANE, uint64(lane))
                number += 1
            if number == SIDE_BY_SIDE:
                put_new_words(
                    address, start, ends_address, number, batch_address, work, quick, table, arena, ids_arena, state,
                    merge_table, ids, narrow,
                )  # fmt: skip
                number = 0
    if number > 0:
        put_new_words(
            address, start, ends_address, number, batch_address, work, quick, table, arena, ids_arena, state,
            merge_table, ids, narrow,
        )  # fmt: skip
    return 0


@helper
def write_ids(place, output, narrow):
    """Write the ids at `place` to the address `output`, whatever words hold them; returns the address behind them."""
    value = load_word(place, 0)
    store_word(output, 0, value)
    # The number of ids is the top byte, and nothing stands below it.
    if narrow:
        store_word(output, 6, load_word(place, 8))
        return output + int64(value >> (LENGTH_SHIFT - ONE))
    store_word(output, 4, load_word(place, 8))
    return output + int64(value >> (LENGTH_SHIFT - ONE - ONE))


@helper
def write_groups(index, count, batch_address, output, narrow):
    while index + 8 <= count and load_byte(batch_address + UNSETTLED, index >> 3) == 0:
        for lane in range(8):
            output = write_ids(int64(load_word(batch_address + PLACES, 8 * (index + lane))), output, narrow)
        index += 8
    return index, output


@kernel
def write_settled(index, count, batch_address, output, narrow):
    """Write the ids of pretokens from `index` on, eight by eight, for as long as all eight are settled; returns the
    pretoken and the address it ended at."""
    not_inlined()
    if narrow:
        return write_groups(index, count, batch_address, output, True)
    return write_groups(index, count, batch_address, output, False)


@kernel
def encode_new(
    address, start, length, key_0, key_1, slot, quick, table, arena, ids_arena, state,
    merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch, output_address, written, narrow,
):  # fmt: skip
    """Merge a pretoken that is not in the table and put it there; returns how many ids are written then, or -1 where
    state says what is needed first."""
    if length > ids.shape[0]:
        state[STATUS], state[NEEDED] = NEEDS_SCRATCH, length
        return -1
    cached = length <= MAX_CACHED_BYTES
    if cached and not arenas_have_room(length, arena, ids_arena, state):
        state[STATUS], state[NEEDED] = NEEDS_ARENA, length
        return -1
    count = merge_word(
        address, start, length, byte_ids, byte_merges, merge_table, state, ids, following, preceding, heap, batch
    )
    if count < 0:
        return -1
    if cached:
        remember(address, start, length, key_0, key_1, slot, count, ids, quick, table, arena, ids_arena, state, narrow)
    for place in range(count):
        write_id(output_address, written + place, narrow, uint64(ids[place]))
    return written + count


@kernel
def encode_pretokens(
    address, start, ends, count, quick, table, arena, ids_arena, state, batch,
    merge_table, byte_ids, byte_merges, ids, following, preceding_ids, heap, batch_of_merge, output, narrow,
):  # fmt: skip
    """Write the ids of the pretokens in `ends`; returns how many pretokens were done (fewer where state says why)."""
    output_address, arena_address = address_of(output), address_of(arena)
    written, item_size = state[OUTPUT_USED], 2 if narrow else 4
    for index in range(count, (count + 7) & ~7):
        ends[index] = ends[index - 1] + 1
    two_batches, ahead_start = address_of(batch), start
    # What one batch asks for arrives while the one before is written.
    for ahead in range(0, count + BATCH, BATCH):
        if ahead < count:
            number = min(count - ahead, BATCH)
            ahead_address = two_batches + BATCH_BYTES * ((ahead // BATCH) & 1)
            ends_ahead = address_of(ends) + 8 * ahead
            missing = look_up_quick(address, ahead_start, ends_ahead, number, quick, ahead_address)
            ask_table(address, ahead_start, ends_ahead, missing, table, ahead_address)
            ahead_start = ends[ahead + number - 1]
        first = ahead - BATCH
        if first < 0:
            continue
        number = min(count - first, BATCH)
        batch_address = two_batches + BATCH_BYTES * ((first // BATCH) & 1)
        ends_address = address_of(ends) + 8 * first
        look_up_table(table, arena, ids_arena, batch_address)
        encode_new_words(
            address, start, ends_address, number, batch_address, two_batches + 2 * BATCH_BYTES, quick,
            table, arena, ids_arena, state, merge_table, byte_ids, byte_merges, ids, narrow,
        )  # fmt: skip
        index = 0
        while index < number:
            index, output_end = write_settled(
                index, number, batch_address, output_address + item_size * written, narrow
            )
            written = (output_end - output_address) // item_size
            unsettled = load_byte(batch_address + UNSETTLED, index >> 3)
            for lane in range(index, min(index + 8, number)):
                if (unsettled >> (lane & 7)) & 1 == 0:
                    place = int64(load_word(batch_address + PLACES, 8 * lane))
                    output_end = write_ids(place, output_address + item_size * written, narrow)
                    written = (output_end - output_address) // item_size
                    continue
                begin = begin_of(lane, start, ends_address)
                key_0 = load_word(batch_address + KEYS_0, 8 * lane)
                key_1 = load_word(batch_address + KEYS_1, 8 * lane)
                slot = find_slot(address, begin, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
                if table[slot, KEY_1] == ZERO:
                    done = encode_new(
                        address, begin, ends[first + lane] - begin, key_0, key_1, slot, quick, table, arena, ids_arena,
                        state, merge_table, byte_ids, byte_merges, ids, following, preceding_ids, heap, batch_of_merge,
                        output_address, written, narrow,
                    )  # fmt: skip
                    if done < 0:
                        state[OUTPUT_USED] = written
                        return first + lane
                    written = done
                elif table[slot, VALUE_0] >= IN_ARENA:
                    ids_start = int64(table[slot, VALUE_0] & LENGTH_MASK) + 1
                    for offset in range(ids_arena[ids_start - 1]):
                        write_id(output_address, written + offset, narrow, uint64(ids_arena[ids_start + offset]))
                    written += int64(ids_arena[ids_start - 1])
                else:
                    place = address_of(table) + 32 * slot + 8 * VALUE_0
                    output_end = write_ids(place, output_address + item_size * written, narrow)
                    written = (output_end - output_address) // item_size
            index += 8
        start = ends[first + number - 1]
    state[OUTPUT_USED] = written
    return count


@kernel
def encode_block(
    text, start, stop, is_last, pattern,
    longest_special_token, byte_pairs, first_byte_starts, token_starts, token_bytes, special_ids,
    classes, ends, batch, quick, table, arena, ids_arena, state,
    merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch_of_merge, output, narrow,
):  # fmt: skip
    """Encode text[start:stop] as far as it is settled, from output[state[OUTPUT_USED]] on; see `count_block`.

    output: bytes of 16-bit ids where `narrow` is set, else of 32-bit ids, with 16 bytes to spare.
    """
    address = address_of(text)
    position = start
    state[STATUS] = DONE
    limit = stop if is_last else max(position, stop - max(longest_special_token, 1))
    item_size = 2 if narrow else 4
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
            if count > 0:
                room = output.shape[0] - 16 - item_size * state[OUTPUT_USED]
                if item_size * (ends[count - 1] - position) > room:
                    state[STATUS], state[NEEDED] = NEEDS_OUTPUT, item_size * (ends[count - 1] - position)
                    return position
            if not has_room(table, state[UNIQUE], count):
                state[STATUS], state[NEEDED] = NEEDS_TABLE, count
                return position
            done = encode_pretokens(
                address, position, ends, count, quick, table, arena, ids_arena, state, batch,
                merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch_of_merge, output, narrow,
            )  # fmt: skip
            if done > 0:
                position = ends[done - 1]
            if done < count:
                return position
            if outcome == INVALID:
                state[STATUS] = NOT_UTF8
                return position
        if special >= 0:
            if item_size * (state[OUTPUT_USED] + 1) + 16 > output.shape[0]:
                state[STATUS], state[NEEDED] = NEEDS_OUTPUT, item_size
                return position
            index = special & 0xFFFFF
            write_id(address_of(output), state[OUTPUT_USED], narrow, uint64(special_ids[index]))
            state[OUTPUT_USED] += 1
            position += token_starts[index + 1] - token_starts[index]
        elif not is_last:
            break
    return position
