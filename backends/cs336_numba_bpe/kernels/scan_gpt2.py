"""From bytes to pretoken ends for GPT-2's pattern, 64 bytes at a time.

A scan covers one text between special tokens, `address[start:stop]`, and writes the offset after each pretoken. It
stops early where `ends` is full, and at bytes that are not UTF-8. The pattern looks only forward, so a scan may be
taken up again at any pretoken's end.
"""

from __future__ import annotations

from numba import uint64

from ..constants import FULL, INVALID, SCANNED
from .characters import ALL, ONE, ZERO, mask_high_bytes, starts_white_space
from .intrinsics import (
    address_of,
    bit,
    byte_masks,
    helper,
    kernel,
    load_byte,
    lowest_bit,
    number_of_bits,
    store_set_bits,
)


@helper
def gpt2_contraction(address, position, stop):
    """The length of 's 't 'm 'd 'll 've 're at an apostrophe, or 0."""
    if position + 1 >= stop:
        return 0
    first = load_byte(address, position + 1)
    if first == ord("s") or first == ord("t") or first == ord("m") or first == ord("d"):
        return 2
    if position + 2 >= stop:
        return 0
    second = load_byte(address, position + 2)
    if (first == ord("l") and second == ord("l")) or (second == ord("e") and (first == ord("v") or first == ord("r"))):
        return 3
    return 0


@kernel
def scan_gpt2(address, start, stop, classes, ends):
    """Write pretoken ends; returns count * 4 + outcome.

    Each character has one class: letter, number, white space or other. A pretoken starts where the class changes, but
    not after a space that leads it; the last character of a white-space run that something follows starts one of its
    own; and an apostrophe that starts a pretoken may make it a contraction, which moves the next start.
    """
    capacity = ends.shape[0] - 72
    count = 0
    letter_before = number_before = other_before = white_before = space_before = ZERO
    letter_carry = number_carry = other_carry = white_carry = ZERO
    starts_to_add = starts_to_clear = ZERO
    block = start
    while block < stop:
        if count > capacity:
            return count * 4 + FULL
        letters, numbers, white, spaces, apostrophes, high, leads = byte_masks(address, block)
        remaining = stop - block
        valid = ALL
        if remaining < 64:
            valid = bit(remaining) - ONE
            letters &= valid
            numbers &= valid
            white &= valid
            spaces &= valid
            apostrophes &= valid
            high &= valid
            leads &= valid
        others = ~(letters | numbers | white | high) & valid
        last_white = ZERO
        if high != ZERO:
            (
                high_letters, high_numbers, high_others, high_white, last_white,
                letter_carry, number_carry, other_carry, white_carry,
            ) = mask_high_bytes(
                address, block, stop, classes, high, leads, letter_carry, number_carry, other_carry, white_carry
            )  # fmt: skip
            if high_letters | high_numbers | high_others | high_white != high:
                return count * 4 + INVALID
            letters |= high_letters
            numbers |= high_numbers
            others |= high_others
            white |= high_white
        starts = letters & ~((letters << ONE) | letter_before)
        starts |= numbers & ~((numbers << ONE) | number_before)
        starts |= others & ~((others << ONE) | other_before)
        starts &= ~((spaces << ONE) | space_before)
        white_after = (white | ~valid) >> ONE
        # Whether white space follows the block's last byte; the end of the text counts, as \s+(?!\S) has it.
        ascii_white_last = (white & ~high) >> uint64(63) != ZERO
        if remaining <= 64 or not ascii_white_last or starts_white_space(address, block + 64, stop, classes):
            white_after |= bit(63)
        starts |= white & ~((white << ONE) | white_before)
        starts |= (white & ~white_after & ~high) | last_white
        starts = (starts & ~starts_to_clear) | starts_to_add
        starts_to_add = starts_to_clear = ZERO
        candidates = starts & apostrophes
        while candidates != ZERO:
            offset = lowest_bit(candidates)
            candidates &= candidates - ONE
            length = gpt2_contraction(address, block + offset, stop)
            if length != 0:
                if offset + 1 < 64:
                    starts &= ~bit(offset + 1)
                else:
                    starts_to_clear |= bit(offset + 1 - 64)
                if block + offset + length < stop:
                    if offset + length < 64:
                        starts |= bit(offset + length)
                    else:
                        starts_to_add |= bit(offset + length - 64)
        if block == start:
            starts &= ~ONE
        place = address_of(ends) + 8 * count
        count += number_of_bits(starts)
        store_set_bits(place, block, starts)
        letter_before = letters >> uint64(63)
        number_before = numbers >> uint64(63)
        other_before = others >> uint64(63)
        white_before = white >> uint64(63)
        space_before = spaces >> uint64(63)
        block += 64
    if stop > start:
        ends[count] = stop
        count += 1
    return count * 4 + SCANNED
