"""Laying out counted words for the merge loop, in the order of their counts.

`symbols` holds all words of two bytes or more, one symbol per byte, with separators between them. Words that occur
equally often stand together, and another count begins in a block of its own, so that one number a block tells how
often a word occurs: a table that stays in the cache, where a word's number for every symbol and a count for every word
would not. Counts of `TOP_CLASS` and more are too many to stand together: each of those words has blocks of its own.
"""

from __future__ import annotations

from ..merge_state import (
    ARENA_USED,
    BLOCK,
    BLOCK_SHIFT,
    HIGHEST,
    MEASURED,
    NEGATIVE_COUNT,
    NUM_ROWS,
    PAIR_KEYS_USED,
    TOO_MANY_BYTES,
    TOP_CLASS,
)
from .intrinsics import helper, kernel
from .pair_table import pair_key, put_row

BYTE_PAIRS = 65536


@helper
def blocks_for(num_symbols):
    return (num_symbols + BLOCK - 1) >> BLOCK_SHIFT


@kernel
def measure_words(word_starts, counts, class_words, class_symbols):
    """How many words of each count there are, of `TOP_CLASS` or more together, and the symbols that they take.

    Returns MEASURED; NEGATIVE_COUNT, or TOO_MANY_BYTES where count times length adds up to more than 63 bits hold.
    """
    left = HIGHEST
    for word in range(counts.shape[0]):
        length = word_starts[word + 1] - word_starts[word]
        if counts[word] < 0:
            return NEGATIVE_COUNT
        if length < 2:
            continue
        if counts[word] > left // length:
            return TOO_MANY_BYTES
        left -= counts[word] * length
        count_class = min(counts[word], TOP_CLASS)
        class_words[count_class] += 1
        class_symbols[count_class] += blocks_for(length + 1) * BLOCK if count_class == TOP_CLASS else length + 1
    return MEASURED


@kernel
def lay_out_words(
    word_bytes, word_starts, counts, next_symbol, symbols, block_counts, pair_counts, pair_places, separator
):
    """Write the words, those of each class from next_symbol[class] on; adds up the count and the number of places of
    each of the 65,536 byte pairs."""
    for position in range(BLOCK):
        symbols[position] = separator
    for count_class in range(TOP_CLASS):
        stop = symbols.shape[0] if count_class == 0 else next_symbol[count_class - 1]
        for block in range(next_symbol[count_class] >> BLOCK_SHIFT, stop >> BLOCK_SHIFT):
            block_counts[block] = count_class
    for word in range(counts.shape[0]):
        start, length = word_starts[word], word_starts[word + 1] - word_starts[word]
        if length < 2:
            continue
        count = counts[word]
        count_class = min(count, TOP_CLASS)
        first = next_symbol[count_class]
        before = 0
        for offset in range(length):
            byte = int(word_bytes[start + offset])
            symbols[first + offset] = byte
            if offset > 0:
                pair = (before << 8) | byte
                pair_counts[pair] += count
                pair_places[pair] += 1
            before = byte
        symbols[first + length] = separator
        stop = first + length + 1
        if count_class == TOP_CLASS:
            for block in range(blocks_for(length + 1)):
                block_counts[(first >> BLOCK_SHIFT) + block] = count
            while stop & (BLOCK - 1) != 0:
                symbols[stop] = separator
                stop += 1
        next_symbol[count_class] = stop
    for count_class in range(TOP_CLASS):
        stop = next_symbol[count_class]
        while stop & (BLOCK - 1) != 0:
            symbols[stop] = separator
            stop += 1
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
        left, right = int(symbols[position]), int(symbols[position + 1])
        if left < 256 and right < 256:
            pair = (left << 8) | right
            arena[next_place[pair]] = position
            next_place[pair] += 1
    state[NUM_ROWS], state[PAIR_KEYS_USED], state[ARENA_USED] = num_rows, num_rows, used
    return 0
