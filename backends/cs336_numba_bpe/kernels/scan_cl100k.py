"""From bytes to pretoken ends for cl100k's pattern, 64 bytes at a time, as `scan_gpt2` does it.

Sums of masks carry a bit from where a run begins to behind its end, from one block to the next too.
"""

from __future__ import annotations

from numba import uint64

from ..character_classes import WHITE_SPACE
from ..constants import FULL, INVALID, SCANNED
from .characters import ALL, NEWLINE, ONE, RETURN, ZERO, character, mask_high_bytes, starts_white_space
from .intrinsics import (
    address_of,
    bit,
    byte_masks,
    helper,
    highest_bit,
    kernel,
    line_end_mask,
    load_byte,
    lowest_bit,
    number_of_bits,
    store_set_bits,
)

LONG_S_LEAD, LONG_S_TRAIL = 0xC5, 0xBF
"""U+017F, which equals "s" where case is ignored."""


@helper
def cl100k_contraction(address, position, stop):
    """The length in bytes of a contraction at an apostrophe, in either case, or 0."""
    if position + 1 >= stop:
        return 0
    first = load_byte(address, position + 1) | 0x20
    if first == ord("s") or first == ord("t") or first == ord("m") or first == ord("d"):
        return 2
    if position + 2 >= stop:
        return 0
    raw_first, raw_second = load_byte(address, position + 1), load_byte(address, position + 2)
    if raw_first == LONG_S_LEAD and raw_second == LONG_S_TRAIL:
        return 3
    second = raw_second | 0x20
    if (first == ord("l") and second == ord("l")) or (second == ord("e") and (first == ord("v") or first == ord("r"))):
        return 3
    return 0


@helper
def add(left, right, carry):
    """The sum of two masks and a carry, and whether it went beyond 64 bits."""
    partial = left + right
    total = partial + carry
    return total, uint64(partial < left) | uint64(total < partial)


@kernel
def line_end_follows(address, position, stop, classes):
    """Whether white space from `position` on goes on to a line end, or to the end of the text."""
    while position < stop:
        if load_byte(address, position) in (NEWLINE, RETURN):
            return True
        found = character(address, position, stop, classes)
        if found >> 3 != WHITE_SPACE:
            return False
        position += found & 7
    return True


@helper
def every_third(numbers, first, run_starts, in_group):
    """The starts of groups of up to three numbers, and how many the last group has so far.

    first: the first bytes of numbers; run_starts: those that no number precedes; in_group: what the block before gave.
    """
    starts = ZERO
    while first != ZERO:
        lowest = first & (~first + ONE)
        first &= first - ONE
        if in_group == 3 or run_starts & lowest != ZERO:
            starts |= lowest
            in_group = 0
        in_group += 1
    return starts, in_group


@kernel
def scan_cl100k(address, start, stop, classes, ends):
    """Write pretoken ends; returns count * 4 + outcome.

    A run of letters starts a pretoken, unless white space (no line end) or a single mark leads it, which starts the
    pretoken then. A run of numbers starts one, and another after every third number. A run of others starts one,
    unless a space leads it, and takes the line ends behind it along. Of the white space that is left, a run starts
    one; so does what follows its last line end, if anything but white space follows that; and so does its last
    character, unless that is a line end or the text's end. An apostrophe that starts a pretoken may make it a
    contraction, behind which the next one starts.
    """
    capacity = ends.shape[0] - 72
    count = in_group = 0
    letter_before = number_before = other_before = white_before = ZERO
    space_before = blank_before = line_end_before = ZERO
    letter_carry = number_carry = other_carry = white_carry = ZERO
    taken_carry = first_carry = starts_to_add = ZERO
    block = start
    while block < stop:
        if count > capacity:
            return count * 4 + FULL
        letters, numbers, white, spaces, apostrophes, high, leads = byte_masks(address, block)
        line_ends = line_end_mask(address, block)
        remaining = stop - block
        valid = ALL
        if remaining < 64:
            valid = bit(remaining) - ONE
            letters &= valid
            numbers &= valid
            white &= valid
            spaces &= valid
            apostrophes &= valid
            line_ends &= valid
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
        first_bytes = ~high | leads

        taken, taken_carry = add(line_ends, line_ends & ((others << ONE) | other_before), taken_carry)
        taken = line_ends & ~taken
        blanks = white & ~line_ends
        line_ends &= ~taken
        left = white & ~taken
        white_after = (white | ~valid) >> ONE
        # Whether white space follows the block's last byte; the end of the text counts, as \s+(?!\S) has it.
        ascii_blank_last = (blanks & ~high) >> uint64(63) != ZERO
        if remaining <= 64 or not ascii_blank_last or starts_white_space(address, block + 64, stop, classes):
            white_after |= bit(63)
        starts = left & ~((left << ONE) | white_before)
        starts |= (blanks & ~white_after & ~high) | last_white
        behind_line_end = blanks & ((line_ends << ONE) | line_end_before)
        if behind_line_end != ZERO:
            run_ends, beyond = add(blanks, behind_line_end, ZERO)
            if beyond != ZERO or run_ends & ~blanks & (line_ends | ~valid) != ZERO:
                candidates = behind_line_end
                while candidates != ZERO:
                    candidate = candidates & (~candidates + ONE)
                    candidates &= candidates - ONE
                    end = lowest_bit(~blanks & ~(candidate - ONE))
                    if end < 64:
                        goes_on = ((line_ends | ~valid) >> uint64(end)) & ONE != ZERO
                    else:
                        after = block + 64 + number_of_bits(white_carry)
                        goes_on = line_end_follows(address, after, stop, classes)
                    if goes_on:
                        behind_line_end &= ~candidate
            starts |= behind_line_end

        other_runs = others & ~((others << ONE) | other_before)
        other_starts = other_runs & ~((spaces << ONE) | space_before)
        # Behind the first mark of each run that no space leads.
        first_others = others & ~(others & first_bytes & ~other_runs)
        behind_first, first_carry = add(first_others, other_starts, first_carry)
        behind_first &= ~first_others
        led = (blanks << ONE) | blank_before | behind_first
        starts |= letters & ~((letters << ONE) | letter_before) & ~led
        starts |= other_starts | starts_to_add
        starts_to_add = ZERO
        if numbers | number_before != ZERO:
            number_starts = numbers & ~((numbers << ONE) | number_before)
            four_in_a_row = numbers & (numbers << ONE) & (numbers << uint64(2)) & (numbers << uint64(3))
            if number_before | four_in_a_row | (numbers & high) == ZERO:
                in_group = 63 - highest_bit(~numbers)
            else:
                number_starts, in_group = every_third(numbers, numbers & first_bytes, number_starts, in_group)
            starts |= number_starts

        candidates = starts & apostrophes
        while candidates != ZERO:
            offset = lowest_bit(candidates)
            candidates &= candidates - ONE
            length = cl100k_contraction(address, block + offset, stop)
            if length != 0 and block + offset + length < stop:
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
        white_before = left >> uint64(63)
        space_before = spaces >> uint64(63)
        blank_before = blanks >> uint64(63)
        line_end_before = line_ends >> uint64(63)
        block += 64
    if stop > start:
        ends[count] = stop
        count += 1
    return count * 4 + SCANNED
