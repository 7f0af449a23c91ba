"""The merge loop over flat arrays.

`symbols` holds all words, one symbol per byte (`word_layout.py`); two numbers above all ids stand for the separators
between words and for bytes inside tokens. A token of several bytes has its id on its first and on its last byte, so
both neighbours are found from token lengths alone. `block_counts` tells how often the words of a block occur.

A pair (a row of the row arrays) has an exact count and a list of places where it was seen. All places of a pair
appear in the very merge that made its newer token, so its list is written once, in order; a place that has become
stale is recognised by its symbols.

For the same reason a pair's count never rises, and pairs that are made with a count below state[FLOOR] are dropped at
once. If N words occur F times or more, the first N merges all join pairs that occur F times or more: a merge makes one
token, so before the N-th one of those words is not yet whole, and every pair inside it occurs as often as it does.

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
    BLOCK_SHIFT,
    FINISHED,
    FLOOR,
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
from .intrinsics import helper, kernel, prefetch_to_write
from .pair_table import find_row, left_of, pair_key, put_row, right_of

FIRST_THRESHOLD_SHARE = 16
"""The heap is filled with pairs that occur at least a sixteenth as often as the most frequent one."""
BATCH = 128
"""Places that are looked at together: first all are tested, so that no branch depends on the outcome, then those that
are not stale are merged."""
PREFETCH_DISTANCE = 24


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
def merge_pairs(
    stop_at,
    symbols,
    block_counts,
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
    symbols_address = address_of(symbols)
    while state[MERGES_DONE] < stop_at:
        row = int64(-1)
        if state[MERGES_DONE] < forced_left.shape[0]:
            place = state[MERGES_DONE]
            row = find_row(pair_key(forced_left[place], forced_right[place]), keys, rows)
            if row < 0 or row_counts[row] <= 0:
                return FINISHED
        while row < 0:
            if state[HEAP_SIZE] == 0:
                if state[THRESHOLD] <= state[FLOOR]:
                    return FINISHED
                highest = int64(0)
                for index in range(state[NUM_ROWS]):
                    highest = max(highest, row_counts[index])
                threshold = max(state[FLOOR], min(state[THRESHOLD] // 4, highest // FIRST_THRESHOLD_SHARE))
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
            or state[ARENA_USED] + 2 * num_places + found.shape[0] > arena.shape[0]
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
        for first in range(row_starts[row], places_stop, BATCH):
            num_candidates = num_found
            for place in range(first, min(first + BATCH, places_stop)):
                if place + PREFETCH_DISTANCE < places_stop:
                    prefetch_to_write(symbols_address, int64(arena[place + PREFETCH_DISTANCE]) * symbols.itemsize)
                position = int64(arena[place])
                found[num_candidates] = position
                num_candidates += int64((symbols[position] == left) & (symbols[position + left_length] == right))
            for candidate in range(num_found, num_candidates):
                position = int64(found[candidate])
                second = position + left_length
                if left == right and (symbols[position] != left or symbols[second] != right):
                    continue
                count = block_counts[position >> BLOCK_SHIFT]
                end = second + right_length
                before, after = int64(symbols[position - 1]), int64(symbols[end])
                if left_length > 1:
                    symbols[second - 1] = inside
                symbols[second] = inside
                symbols[position] = result
                symbols[end - 1] = result
                found[num_found], found_left[num_found], found_right[num_found] = position, before, after
                num_found += 1
                if left_places[before] == 0:
                    left_tokens[num_left] = before
                    num_left += 1
                left_places[before] += 1
                left_counts[before] += count
                if before == result:
                    twice += count
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
        # result in front of it and the first saw `left` behind it, which has gone since: those are taken off again. The
        # places of dropped pairs, and of separators as neighbours, overwrite one another at the arena's end.
        dropped = arena.shape[0] - found.shape[0]
        for side in range(2):
            for index in range(num_left if side == 0 else num_right):
                if side == 0:
                    neighbour = int64(left_tokens[index])
                    key, places, count = pair_key(neighbour, result), left_places[neighbour], left_counts[neighbour]
                    left_counts[neighbour] = 0
                    is_kept = neighbour != separator and count >= state[FLOOR]
                    left_places[neighbour] = state[ARENA_USED] if is_kept else dropped
                else:
                    neighbour = int64(right_tokens[index])
                    key, places, count = pair_key(result, neighbour), right_places[neighbour], right_counts[neighbour]
                    if neighbour == left:
                        count -= twice
                    right_counts[neighbour] = 0
                    is_kept = neighbour != separator and count >= state[FLOOR]
                    right_places[neighbour] = state[ARENA_USED] if is_kept else dropped
                if not is_kept:
                    continue
                row = state[NUM_ROWS]
                state[NUM_ROWS] += 1
                row_keys[row], row_counts[row] = key, count
                row_starts[row], row_lengths[row] = state[ARENA_USED], places
                state[ARENA_USED] += places
                put_row(key, row, keys, rows)
                state[PAIR_KEYS_USED] += 1
                if count >= state[THRESHOLD]:
                    state[HEAP_SIZE] = heap_push(
                        count, row, state[HEAP_SIZE], heap_counts, heap_rows, row_keys,
                        token_order, token_starts, token_lengths, token_bytes,
                    )  # fmt: skip
        for index in range(num_found):
            before, after = int64(found_left[index]), int64(found_right[index])
            place = left_places[before]
            arena[place] = found[index] - token_lengths[before]
            left_places[before] = place + 1
            place = right_places[after]
            arena[place] = found[index]
            right_places[after] = place + 1
        for index in range(num_left):
            left_places[left_tokens[index]] = 0
        for index in range(num_right):
            right_places[right_tokens[index]] = 0
    return PAUSED
