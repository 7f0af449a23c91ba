"""Encoding: pretokens to token ids, with a table of those that were met before.

The table is the counter's (32-byte slots); the last two words of a slot hold ids. Up to seven 16-bit ids or three wider
ones of a short pretoken are in the slot itself, laid out as the output wants them, and the top byte is their number:
both words are written out whatever they hold, and the output goes on behind the last id. Otherwise that byte is 0xFF
and the first word is a place in the arena of ids, where their number comes first.

`hot` is a smaller table of the same slots, one place for each pretoken: the first short pretoken of each place is there
too, and as the most frequent ones are put in first, most look-ups end there. 256 pretokens are taken at a time: first
their keys are made and their places in `hot` asked for, then the address of the slot to look at is chosen, without a
branch, and asked for, then ids are written, so that cache misses overlap.

A pretoken that is new is merged as the contract says: the pair that comes first in `merges` is joined wherever it
stands, from left to right, before the next pair is looked for. `merge_table` holds pair, then rank and result, by
open addressing.
"""

from __future__ import annotations

from numba import int64, uint64

from ..constants import (
    ARENA_USED,
    DONE,
    IDS_USED,
    INLINE_BYTES,
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
    SHORT_WORD,
    STATUS,
    UNIQUE,
)
from .count_table import (
    BATCH,
    KEY_0,
    KEY_1,
    LENGTH_SHIFT,
    OFFSET,
    copy_bytes,
    find_slot,
    has_room,
    is_long,
    key_hash,
    key_length,
    long_key,
    scan,
    short_key,
    slot_of,
)
from .intrinsics import (
    address_of,
    helper,
    kernel,
    load_byte,
    load_word,
    lowest_bit,
    prefetch,
    select,
    store_uint16,
    store_uint32,
    store_word,
)
from .pair_table import NO_KEY, pair_key, pair_slot
from .scanner import ZERO
from .text_pieces import last_safe_cut, next_special_token

VALUE_0, VALUE_1 = 2, 3
NO_MERGE = int64(1 << 62)
IN_ARENA = uint64(LONG << 56)


@helper
def find_merge(left, right, merge_table):
    """rank * 2**32 + result of a pair, or NO_MERGE."""
    key = pair_key(left, right)
    mask = merge_table.shape[0] - 1
    slot = pair_slot(key, merge_table)
    while True:
        if merge_table[slot, 0] == key:
            return int64(merge_table[slot, 1])
        if merge_table[slot, 0] == NO_KEY:
            return NO_MERGE
        slot = (slot + 1) & mask


@kernel
def put_merges(left, right, ranks, results, merge_table):
    """Fill an empty merge table; a pair that comes again takes the later rank."""
    mask = merge_table.shape[0] - 1
    for index in range(left.shape[0]):
        key = pair_key(left[index], right[index])
        slot = pair_slot(key, merge_table)
        while merge_table[slot, 0] != NO_KEY and merge_table[slot, 0] != key:
            slot = (slot + 1) & mask
        merge_table[slot, 0] = key
        merge_table[slot, 1] = (uint64(ranks[index]) << uint64(32)) | uint64(results[index])
    return 0


@kernel
def merge_short(count, ids, merges, merge_table):
    """Merge ids[:count] in place; `merges` has what each pair becomes. Returns how many ids are left."""
    while count > 1:
        best = NO_MERGE
        first = int64(0)
        for index in range(count - 1):
            if merges[index] < best:
                best, first = merges[index], index
        if best == NO_MERGE:
            break
        index = first
        while index < count - 1:
            if merges[index] == best:
                ids[index] = best & int64(0xFFFFFFFF)
                count -= 1
                for later in range(index + 1, count):
                    ids[later] = ids[later + 1]
                    merges[later - 1] = merges[later]
                if index > 0:
                    merges[index - 1] = find_merge(ids[index - 1], ids[index], merge_table)
                if index < count - 1:
                    merges[index] = find_merge(ids[index], ids[index + 1], merge_table)
            index += 1
    return count


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
    before = int64(0)
    for offset in range(length):
        byte = load_byte(address, start + offset)
        ids[offset] = byte_ids[byte]
        if byte_ids[byte] < 0:
            state[STATUS], state[NEEDED] = MISSING_BYTE, byte
            return -1
        if 0 < offset < SHORT_WORD:
            following[offset - 1] = byte_merges[before * 256 + byte]
        before = byte
    if length <= SHORT_WORD:
        return merge_short(length, ids, following, merge_table)
    return merge_long(length, ids, following, preceding, heap, batch, merge_table)


@helper
def write_id(address, place, narrow, token):
    if narrow:
        store_uint16(address, 2 * place, token)
    else:
        store_uint32(address, 4 * place, token)


@helper
def hot_address(key_0, key_1, hot):
    """The address of a pretoken's only place in `hot`, from the bits of its hash that the table does not use first."""
    bits = lowest_bit(uint64(hot.shape[0]))
    return address_of(hot) + 32 * int64(key_hash(key_0, key_1) >> uint64(64 - bits))


@kernel
def remember(address, start, length, key_0, key_1, slot, count, ids, hot, table, arena, ids_arena, state, narrow):
    """Put a pretoken and its ids into a free slot; both arenas must have room."""
    table[slot, KEY_0], table[slot, KEY_1] = key_0, key_1
    state[UNIQUE] += 1
    bits = 16 if narrow else 32
    if (count + 1) * bits <= 128 and not is_long(key_1):
        value_0, value_1 = ZERO, uint64(count) << LENGTH_SHIFT
        for place in range(count):
            shifted = uint64(ids[place]) << uint64((place * bits) & 63)
            if place * bits < 64:
                value_0 |= shifted
            else:
                value_1 |= shifted
        table[slot, VALUE_0], table[slot, VALUE_1] = value_0, value_1
        place = hot_address(key_0, key_1, hot)
        if load_word(place, 8) == ZERO:
            store_word(place, 0, key_0)
            store_word(place, 8, key_1)
            store_word(place, 16, value_0)
            store_word(place, 24, value_1)
        return
    used = state[IDS_USED]
    ids_arena[used] = count
    for index in range(count):
        ids_arena[used + 1 + index] = ids[index]
    state[IDS_USED] = used + 1 + count
    table[slot, VALUE_0], table[slot, VALUE_1] = uint64(used), IN_ARENA
    if is_long(key_1):
        bytes_used = state[ARENA_USED]
        copy_bytes(address, start, length, arena, bytes_used)
        table[slot, OFFSET] = IN_ARENA | uint64(bytes_used)
        state[ARENA_USED] = bytes_used + length


@helper
def arenas_have_room(length, arena, ids_arena, state):
    return state[ARENA_USED] + length + 8 <= arena.shape[0] and state[IDS_USED] + length + 1 <= ids_arena.shape[0]


@kernel
def encode_words(
    word_bytes, word_starts, hot, table, arena, ids_arena, state,
    merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch, narrow,
):  # fmt: skip
    """Put words into the table ahead of their first use. Everything must have room; words with missing bytes are left
    out."""
    address, arena_address = address_of(word_bytes), address_of(arena)
    for word in range(word_starts.shape[0] - 1):
        start, length = word_starts[word], word_starts[word + 1] - word_starts[word]
        if length == 0 or length > MAX_CACHED_BYTES:
            continue
        if length <= INLINE_BYTES:
            key_0, key_1 = short_key(address, start, length)
        else:
            key_0, key_1 = long_key(address, start, length)
        slot = find_slot(address, start, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
        if table[slot, KEY_1] == ZERO:
            count = merge_word(
                address, start, length, byte_ids, byte_merges, merge_table, state, ids, following, preceding, heap,
                batch,
            )  # fmt: skip
            if count > 0:
                remember(
                    address, start, length, key_0, key_1, slot, count, ids, hot, table, arena, ids_arena, state, narrow
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
def put_words(word_bytes, word_starts, word_ids, id_starts, hot, table, arena, ids_arena, state, ids, narrow):
    """Put words whose ids are known into the table; everything must have room."""
    address, arena_address = address_of(word_bytes), address_of(arena)
    for word in range(word_starts.shape[0] - 1):
        start, length = word_starts[word], word_starts[word + 1] - word_starts[word]
        count = id_starts[word + 1] - id_starts[word]
        if length <= INLINE_BYTES:
            key_0, key_1 = short_key(address, start, length)
        else:
            key_0, key_1 = long_key(address, start, length)
        slot = find_slot(address, start, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
        if table[slot, KEY_1] == ZERO and count > 0:
            for index in range(count):
                ids[index] = word_ids[id_starts[word] + index]
            remember(
                address, start, length, key_0, key_1, slot, count, ids, hot, table, arena, ids_arena, state, narrow
            )
    return 0


@kernel
def make_entries(address, start, ends_address, count, key_masks, hot, batch_address):
    """For `count` pretokens, the first from `start` on: both keys, the hash and where it begins, four words each; and
    their places in `hot` are asked for."""
    hot_bits = lowest_bit(uint64(hot.shape[0]))
    masks_address, hot_start = address_of(key_masks), address_of(hot)
    for index in range(count):
        end = int64(load_word(ends_address, 8 * index))
        length = end - start
        if length <= INLINE_BYTES:
            masks = masks_address + 32 * length
            key_0 = load_word(address, start) & load_word(masks, 0)
            key_1 = (load_word(address, start + 8) & load_word(masks, 8)) | load_word(masks, 16)
        else:
            key_0, key_1 = long_key(address, start, length)
        digest = key_hash(key_0, key_1)
        prefetch(hot_start + 32 * int64(digest >> uint64(64 - hot_bits)), 0)
        entry = batch_address + 32 * index
        store_word(entry, 0, key_0)
        store_word(entry, 8, key_1)
        store_word(entry, 16, digest)
        store_word(entry, 24, uint64(start))
        start = end
    return start


@kernel
def choose_slots(count, hot, table, batch_address):
    """Put the address of the slot to look at in place of each hash: in `hot` if the pretoken is there; ask for it."""
    hot_bits = lowest_bit(uint64(hot.shape[0]))
    hot_start, table_start = address_of(hot), address_of(table)
    mask = uint64(table.shape[0] - 1)
    for index in range(count):
        entry = batch_address + 32 * index
        digest = load_word(entry, 16)
        hot_slot = hot_start + 32 * int64(digest >> uint64(64 - hot_bits))
        slot = table_start + 32 * int64(digest & mask)
        different = (load_word(hot_slot, 0) ^ load_word(entry, 0)) | (load_word(hot_slot, 8) ^ load_word(entry, 8))
        slot = select(different == ZERO, hot_slot, slot)
        prefetch(slot, 0)
        store_word(entry, 16, uint64(slot))
    return 0


@kernel
def encode_new(
    address, start, length, key_0, key_1, slot, hot, table, arena, ids_arena, state,
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
        remember(address, start, length, key_0, key_1, slot, count, ids, hot, table, arena, ids_arena, state, narrow)
    for place in range(count):
        write_id(output_address, written + place, narrow, uint64(ids[place]))
    return written + count


@kernel
def encode_pretokens(
    address, start, ends, count, key_masks, hot, table, arena, ids_arena, state, entries,
    merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch, output, narrow,
):  # fmt: skip
    """Write the ids of the pretokens in `ends`; returns how many pretokens were done (fewer where state says why)."""
    output_address, arena_address, batch_address = address_of(output), address_of(arena), address_of(entries)
    item_size = 2 if narrow else 4
    written = state[OUTPUT_USED]
    for first in range(0, count, BATCH):
        number = min(count - first, BATCH)
        ends_address = address_of(ends) + 8 * first
        start = make_entries(address, start, ends_address, number, key_masks, hot, batch_address)
        choose_slots(number, hot, table, batch_address)
        for index in range(number):
            entry = batch_address + 32 * index
            key_0, key_1, place = load_word(entry, 0), load_word(entry, 8), int64(load_word(entry, 16))
            value_0, value_1 = load_word(place, 16), load_word(place, 24)
            if (load_word(place, 0) ^ key_0) | (load_word(place, 8) ^ key_1) != ZERO or value_1 >= IN_ARENA:
                begin, length = int64(load_word(entry, 24)), key_length(key_1)
                slot = find_slot(address, begin, key_0, key_1, slot_of(key_0, key_1, table), table, arena_address)
                if table[slot, KEY_1] == ZERO:
                    done = encode_new(
                        address, begin, length, key_0, key_1, slot, hot, table, arena, ids_arena, state,
                        merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch,
                        output_address, written, narrow,
                    )  # fmt: skip
                    if done < 0:
                        state[OUTPUT_USED] = written
                        return first + index
                    written = done
                    continue
                value_0, value_1 = table[slot, VALUE_0], table[slot, VALUE_1]
                if value_1 >= IN_ARENA:
                    ids_start = int64(value_0) + 1
                    for offset in range(ids_arena[ids_start - 1]):
                        write_id(output_address, written + offset, narrow, uint64(ids_arena[ids_start + offset]))
                    written += int64(ids_arena[ids_start - 1])
                    continue
            store_word(output_address, item_size * written, value_0)
            store_word(output_address, item_size * written + 8, value_1)
            written += int64(value_1 >> LENGTH_SHIFT)
    state[OUTPUT_USED] = written
    return count


@kernel
def encode_block(
    text, start, stop, is_last, pattern,
    longest_special_token, byte_pairs, first_byte_starts, token_starts, token_bytes, special_ids,
    classes, ends, entries, key_masks, hot, table, arena, ids_arena, state,
    merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch, output, narrow,
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
                address, position, ends, count, key_masks, hot, table, arena, ids_arena, state, entries,
                merge_table, byte_ids, byte_merges, ids, following, preceding, heap, batch, output, narrow,
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
