"""The merge loop over flat arrays.

`symbols` holds all words of two bytes or more, one symbol per byte, with separators between them (the greatest number
of its type; the next lower one marks bytes inside tokens). A token of several bytes has its id on its first and on its
last byte, so both neighbours are found from token lengths alone. `word_ids` gives each byte's word, `word_counts` each
word's count.

A pair (a row of the row arrays) has an exact count and a list of places where it was seen. All places of a pair
appear in the very merge that made its newer token, so its list is written once, in order; a place that has become
stale is recognised by its symbols.

No merge can make bytes that an earlier merge made. Take any stretch of text whose borders no token crosses. By
induction over the merges, its inside is tokenised as if it stood alone: a left-to-right pass that does not cross the
left border starts afresh there. So at any time all such stretches with the same bytes are split alike, and one merge
takes them all.

The heap is lazy and holds pairs from a threshold on; when it runs dry the threshold falls to a quarter and all rows are
looked through again. Ties go to the greater pair of `token_order` values, then of whole bytes, so both policies share
one comparison.
"""

from __future__ import annotations

from numba import int64, uint64

from ..merge_state import (
    APPLIED,
    ARENA_USED,
    FINISHED,
    HEAP_SIZE,
    LENGTH,
    MERGES_DONE,
    NEEDED,
    NEEDS_GROWTH,
    NUM_ROWS,
    NUM_TOKENS,
    PAIR_KEYS_USED,
    PAUSED,
    RESCANS,
    THRESHOLD,
    TOKEN_BYTES_USED,
)
from .count_table import address_of
from .intrinsics import helper, kernel, prefetch

NO_KEY = uint64(0xFFFFFFFFFFFFFFFF)
LOW_HALF = uint64(0xFFFFFFFF)
MULTIPLIER = uint64(0x9E3779B97F4A7C15)
BYTE_PAIRS = 65536
FIRST_THRESHOLD_SHARE = 16
"""The heap is filled with pairs that occur at least a sixteenth as often as the most frequent one."""


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


@helper
def compare_tokens(one, other, token_order, token_starts, token_lengths, token_bytes):
    """1 where `one` is the greater, -1 where it is the smaller, 0 where both are the same token."""
    if one == other:
        return 0
    if token_order[one] != token_order[other]:
        return 1 if token_order[one] > token_order[other] else -1
    shared = min(token_lengths[one], token_lengths[other])
    for offset in range(8, shared):
        byte, other_byte = token_bytes[token_starts[one] + offset], token_bytes[token_starts[other] + offset]
        if byte != other_byte:
            return 1 if byte > other_byte else -1
    return 1 if token_lengths[one] > token_lengths[other] else -1


@kernel
def is_better(count, key, other_count, other_key, token_order, token_starts, token_lengths, token_bytes):
    """Whether a pair is merged before another one: the higher count, then the greater pair."""
    if count != other_count:
        return count > other_count
    order = compare_tokens(left_of(key), left_of(other_key), token_order, token_starts, token_lengths, token_bytes)
    if order == 0:
        order = compare_tokens(
            right_of(key), right_of(other_key), token_order, token_starts, token_lengths, token_bytes
        )
    return order > 0


@kernel
def heap_push(
    count, row, size, heap_counts, heap_rows, row_keys, token_order, token_starts, token_lengths, token_bytes
):
    place = size
    key = row_keys[row]
    while place > 0:
        parent = (place - 1) >> 1
        if not is_better(
            count, key, heap_counts[parent], row_keys[heap_rows[parent]],
            token_order, token_starts, token_lengths, token_bytes,
        ):  # fmt: skip
            break
        heap_counts[place], heap_rows[place] = heap_counts[parent], heap_rows[parent]
        place = parent
    heap_counts[place], heap_rows[place] = count, row
    return size + 1


@kernel
def heap_replace_top(
    count, row, size, heap_counts, heap_rows, row_keys, token_order, token_starts, token_lengths, token_bytes
):
    """Put an entry in the place of the top one."""
    place = 0
    key = row_keys[row]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and is_better(
            heap_counts[child + 1], row_keys[heap_rows[child + 1]], heap_counts[child], row_keys[heap_rows[child]],
            token_order, token_starts, token_lengths, token_bytes,
        ):  # fmt: skip
            child += 1
        if not is_better(
            heap_counts[child], row_keys[heap_rows[child]], count, key,
            token_order, token_starts, token_lengths, token_bytes,
        ):  # fmt: skip
            break
        heap_counts[place], heap_rows[place] = heap_counts[child], heap_rows[child]
        place = child
    heap_counts[place], heap_rows[place] = count, row
    return 0


@kernel
def lay_out_words(word_bytes, word_starts, counts, symbols, word_ids, word_counts, separator):
    """Write words of two bytes or more as symbols; returns how many symbols there are."""
    used, word = 1, 0
    symbols[0], word_ids[0] = separator, 0
    for index in range(counts.shape[0]):
        start, stop = word_starts[index], word_starts[index + 1]
        if stop - start < 2:
            continue
        word_counts[word] = counts[index]
        for position in range(start, stop):
            symbols[used], word_ids[used] = word_bytes[position], word
            used += 1
        symbols[used], word_ids[used] = separator, word
        used += 1
        word += 1
    return used


@kernel
def count_byte_pairs(symbols, word_ids, word_counts, pair_counts, pair_places):
    """Add up the count and the number of places of each of the 65,536 byte pairs."""
    for position in range(symbols.shape[0] - 1):
        left, right = int64(symbols[position]), int64(symbols[position + 1])
        if left < 256 and right < 256:
            pair = (left << 8) | right
            pair_counts[pair] += word_counts[word_ids[position]]
            pair_places[pair] += 1
    return 0


@kernel
def list_byte_pairs(
    symbols,
    pair_counts,
    pair_places,
    next_place,
    arena,
    row_keys,
    row_counts,
    row_starts,
    row_lengths,
    keys,
    rows,
    state,
):
    """Make a row for each byte pair and list its places in the arena. `next_place` is scratch for 65,536 numbers."""
    used = num_rows = 0
    for pair in range(BYTE_PAIRS):
        next_place[pair] = used
        if pair_places[pair] > 0:
            key = pair_key(pair >> 8, pair & 255)
            row_keys[num_rows], row_counts[num_rows] = key, pair_counts[pair]
            row_starts[num_rows], row_lengths[num_rows] = used, pair_places[pair]
            put_row(key, num_rows, keys, rows)
            num_rows += 1
            used += pair_places[pair]
    for position in range(symbols.shape[0] - 1):
        left, right = int64(symbols[position]), int64(symbols[position + 1])
        if left < 256 and right < 256:
            pair = (left << 8) | right
            arena[next_place[pair]] = position
            next_place[pair] += 1
    state[NUM_ROWS], state[PAIR_KEYS_USED], state[ARENA_USED] = num_rows, num_rows, used
    return 0


@kernel
def merge_pairs(
    stop_at,
    symbols,
    word_ids,
    word_counts,
    arena,
    row_keys,
    row_counts,
    row_starts,
    row_lengths,
    keys,
    rows,
    heap_counts,
    heap_rows,
    token_bytes,
    token_starts,
    token_lengths,
    token_order,
    left_counts,
    right_counts,
    left_places,
    right_places,
    left_tokens,
    right_tokens,
    found,
    found_left,
    found_right,
    merge_left,
    merge_right,
    merge_count,
    state,
    order_by_bytes,
    separator,
    forced_left,
    forced_right,
):
    """Merge until state[MERGES_DONE] reaches `stop_at`, no pair is left, or an array is too small for the next merge.

    The next merge is the best pair, or while there are any, the next of `forced_left`, `forced_right` (a resumed run).
    Returns PAUSED, FINISHED or NEEDS_GROWTH; then state[NEEDED] is an upper bound for
    the places of the next merge (or for the heap's entries) and state[LENGTH] is the new token's length.
    """
    inside = separator - 1
    symbols_address, word_ids_address = address_of(symbols), address_of(word_ids)
    while state[MERGES_DONE] < stop_at:
        row = int64(-1)
        if state[MERGES_DONE] < forced_left.shape[0]:
            place = state[MERGES_DONE]
            row = find_row(pair_key(forced_left[place], forced_right[place]), keys, rows)
            if row < 0 or row_counts[row] <= 0:
                return FINISHED
        while row < 0:
            if state[HEAP_SIZE] == 0:
                if state[THRESHOLD] <= 1:
                    return FINISHED
                highest = int64(0)
                for index in range(state[NUM_ROWS]):
                    highest = max(highest, row_counts[index])
                threshold = max(1, min(state[THRESHOLD] // 4, highest // FIRST_THRESHOLD_SHARE))
                candidates = 0
                for index in range(state[NUM_ROWS]):
                    if row_counts[index] >= threshold:
                        candidates += 1
                if candidates + 1024 > heap_counts.shape[0]:
                    state[NEEDED], state[LENGTH] = candidates, 0
                    return NEEDS_GROWTH
                state[THRESHOLD] = threshold
                state[RESCANS] += 1
                for index in range(state[NUM_ROWS]):
                    if row_counts[index] >= threshold:
                        state[HEAP_SIZE] = heap_push(
                            row_counts[index], index, state[HEAP_SIZE], heap_counts, heap_rows, row_keys,
                            token_order, token_starts, token_lengths, token_bytes,
                        )  # fmt: skip
                continue
            top = int64(heap_rows[0])
            current = row_counts[top]
            if current == heap_counts[0]:
                row = top
            elif current >= state[THRESHOLD]:
                heap_replace_top(
                    current, top, state[HEAP_SIZE], heap_counts, heap_rows, row_keys,
                    token_order, token_starts, token_lengths, token_bytes,
                )  # fmt: skip
            else:
                state[HEAP_SIZE] -= 1
                last = state[HEAP_SIZE]
                if last > 0:
                    heap_replace_top(
                        heap_counts[last], int64(heap_rows[last]), last, heap_counts, heap_rows, row_keys,
                        token_order, token_starts, token_lengths, token_bytes,
                    )  # fmt: skip
        left, right = left_of(row_keys[row]), right_of(row_keys[row])
        left_length, right_length = token_lengths[left], token_lengths[right]
        length = left_length + right_length
        num_places = row_lengths[row]
        neighbours = min(2 * num_places, 2 * state[NUM_TOKENS]) + 4
        if (
            num_places > found.shape[0]
            or state[ARENA_USED] + 2 * num_places > arena.shape[0]
            or state[NUM_ROWS] + neighbours > row_keys.shape[0]
            or 2 * (state[PAIR_KEYS_USED] + neighbours) > keys.shape[0]
            or state[HEAP_SIZE] + neighbours > heap_counts.shape[0]
            or state[TOKEN_BYTES_USED] + length > token_bytes.shape[0]
            or state[NUM_TOKENS] + 1 > token_starts.shape[0]
        ):
            state[NEEDED], state[LENGTH] = num_places, length
            return NEEDS_GROWTH

        new_start = state[TOKEN_BYTES_USED]
        for offset in range(left_length):
            token_bytes[new_start + offset] = token_bytes[token_starts[left] + offset]
        for offset in range(right_length):
            token_bytes[new_start + left_length + offset] = token_bytes[token_starts[right] + offset]
        result = state[NUM_TOKENS]
        state[NUM_TOKENS] += 1
        token_starts[result], token_lengths[result] = new_start, length
        state[TOKEN_BYTES_USED] += length
        order = ~uint64(result)
        if order_by_bytes:
            order = uint64(0)
            for offset in range(8):
                order <<= uint64(8)
                if offset < length:
                    order |= uint64(token_bytes[new_start + offset])
        token_order[result] = order
        merge = state[MERGES_DONE]
        merge_left[merge], merge_right[merge], merge_count[merge] = left, right, row_counts[row]
        state[MERGES_DONE] += 1

        num_found = num_left = num_right = 0
        twice = int64(0)
        places_stop = row_starts[row] + num_places
        for place in range(row_starts[row], places_stop):
            if place + 12 < places_stop:
                coming = int64(arena[place + 12])
                prefetch(symbols_address, coming * symbols.itemsize)
                prefetch(word_ids_address, coming * word_ids.itemsize)
            position = int64(arena[place])
            if symbols[position] != left:
                continue
            second = position + left_length
            if symbols[second] != right:
                continue
            count = word_counts[word_ids[position]]
            end = second + right_length
            before, after = int64(symbols[position - 1]), int64(symbols[end])
            if left_length > 1:
                symbols[second - 1] = inside
            symbols[second] = inside
            symbols[position] = result
            symbols[end - 1] = result
            found[num_found], found_left[num_found], found_right[num_found] = position, before, after
            num_found += 1
            if before < inside:
                if left_places[before] == 0:
                    left_tokens[num_left] = before
                    num_left += 1
                left_places[before] += 1
                left_counts[before] += count
                if before == result:
                    twice += count
            if after < inside:
                if right_places[after] == 0:
                    right_tokens[num_right] = after
                    num_right += 1
                right_places[after] += 1
                right_counts[after] += count
        state[APPLIED] += num_found
        row_counts[row] = 0

        # Pairs that lost places: (neighbour, left) and (right, neighbour).
        for index in range(num_left):
            before = int64(left_tokens[index])
            if before != result:
                changed = find_row(pair_key(before, left), keys, rows)
                if changed != row and changed >= 0:
                    row_counts[changed] -= left_counts[before]
        for index in range(num_right):
            after = int64(right_tokens[index])
            changed = find_row(pair_key(right, after), keys, rows)
            if changed != row and changed >= 0:
                row_counts[changed] -= right_counts[after]

        # New pairs: (neighbour, result), then (result, neighbour). Where two merged places touch, the second saw the
        # result in front of it and the first saw `left` behind it, which has gone since: those are taken off again.
        for side in range(2):
            for index in range(num_left if side == 0 else num_right):
                row = state[NUM_ROWS]
                state[NUM_ROWS] += 1
                row_starts[row] = state[ARENA_USED]
                if side == 0:
                    neighbour = int64(left_tokens[index])
                    row_keys[row] = pair_key(neighbour, result)
                    row_lengths[row], row_counts[row] = left_places[neighbour], left_counts[neighbour]
                    left_counts[neighbour] = 0
                    left_places[neighbour] = state[ARENA_USED]
                else:
                    neighbour = int64(right_tokens[index])
                    row_keys[row] = pair_key(result, neighbour)
                    row_lengths[row], row_counts[row] = right_places[neighbour], right_counts[neighbour]
                    right_counts[neighbour] = 0
                    right_places[neighbour] = state[ARENA_USED]
                    if neighbour == left:
                        row_counts[row] -= twice
                state[ARENA_USED] += row_lengths[row]
                put_row(row_keys[row], row, keys, rows)
                state[PAIR_KEYS_USED] += 1
                if row_counts[row] >= state[THRESHOLD]:
                    state[HEAP_SIZE] = heap_push(
                        row_counts[row], row, state[HEAP_SIZE], heap_counts, heap_rows, row_keys,
                        token_order, token_starts, token_lengths, token_bytes,
                    )  # fmt: skip
        for index in range(num_found):
            before, after = int64(found_left[index]), int64(found_right[index])
            if before < inside:
                arena[left_places[before]] = found[index] - token_lengths[before]
                left_places[before] += 1
            if after < inside:
                arena[right_places[after]] = found[index]
                right_places[after] += 1
        for index in range(num_left):
            left_places[left_tokens[index]] = 0
        for index in range(num_right):
            right_places[right_tokens[index]] = 0
    return PAUSED
