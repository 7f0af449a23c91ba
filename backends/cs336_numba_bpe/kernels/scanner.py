"""From bytes to pretoken ends, for GPT-2's pattern (64 bytes at a time) and for cl100k's (character by character).

A scan covers one text between special tokens, `address[start:stop]`, and writes the offset after each pretoken. It
stops early where `ends` is full, and at bytes that are not UTF-8. Both patterns look only forward, so a scan may be
taken up again at any pretoken's end.
"""

from __future__ import annotations

from numba import uint64

from ..character_classes import LETTER, NUMBER, OTHER, WHITE_SPACE
from ..constants import FULL, INVALID, SCANNED
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

ZERO, ONE, ALL = uint64(0), uint64(1), uint64(0xFFFFFFFFFFFFFFFF)
SPACE, APOSTROPHE, NEWLINE, RETURN = ord(" "), ord("'"), ord("\n"), ord("\r")
LONG_S_LEAD, LONG_S_TRAIL = 0xC5, 0xBF
"""U+017F, which equals "s" where case is ignored."""


@helper
def is_continuation(byte):
    return (byte & 0xC0) == 0x80


@kernel
def decode(address, position, stop, classes):
    """class * 8 + length of the character at `position`, whose first byte is >= 0x80; 0 where it is not UTF-8."""
    lead = load_byte(address, position)
    if lead < 0xC2 or lead > 0xF4 or position + 1 >= stop:
        return 0
    second = load_byte(address, position + 1)
    if not is_continuation(second):
        return 0
    if lead < 0xE0:
        return classes[((lead & 0x1F) << 6) | (second & 0x3F)] * 8 + 2
    if position + 2 >= stop:
        return 0
    third = load_byte(address, position + 2)
    if not is_continuation(third):
        return 0
    if lead < 0xF0:
        if (lead == 0xE0 and second < 0xA0) or (lead == 0xED and second > 0x9F):
            return 0
        return classes[((lead & 0x0F) << 12) | ((second & 0x3F) << 6) | (third & 0x3F)] * 8 + 3
    if position + 3 >= stop:
        return 0
    fourth = load_byte(address, position + 3)
    if not is_continuation(fourth) or (lead == 0xF0 and second < 0x90) or (lead == 0xF4 and second > 0x8F):
        return 0
    code_point = ((lead & 0x07) << 18) | ((second & 0x3F) << 12) | ((third & 0x3F) << 6) | (fourth & 0x3F)
    return classes[code_point] * 8 + 4


@helper
def character(address, position, stop, classes):
    """class * 8 + length of any character; 0 where it is not UTF-8."""
    byte = load_byte(address, position)
    if byte < 0x80:
        return classes[byte] * 8 + 1
    return decode(address, position, stop, classes)


@helper
def starts_white_space(address, position, stop, classes):
    return character(address, position, stop, classes) >> 3 == WHITE_SPACE


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
            high_letters, high_numbers = letter_carry, number_carry
            high_others, high_white = other_carry, white_carry
            letter_carry = number_carry = other_carry = white_carry = ZERO
            while leads != ZERO:
                offset = lowest_bit(leads)
                leads &= leads - ONE
                decoded = decode(address, block + offset, stop, classes)
                if decoded == 0:
                    return count * 4 + INVALID
                length = decoded & 7
                body = bit(length) - ONE
                here = body << uint64(offset)
                beyond = ZERO
                if offset + length > 64:
                    beyond = body >> uint64(64 - offset)
                kind = decoded >> 3
                if kind == LETTER:
                    high_letters |= here
                    letter_carry = beyond
                elif kind == NUMBER:
                    high_numbers |= here
                    number_carry = beyond
                elif kind == WHITE_SPACE:
                    high_white |= here
                    white_carry = beyond
                    after = block + offset + length
                    if after < stop and not starts_white_space(address, after, stop, classes):
                        last_white |= bit(offset)
                else:
                    high_others |= here
                    other_carry = beyond
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
def is_line_end(byte):
    return byte in (NEWLINE, RETURN)


@helper
def run_end(address, position, stop, classes, kind):
    """Where the run of characters of one class that starts at `position` ends; bytes that are not UTF-8 end it."""
    while position < stop:
        found = character(address, position, stop, classes)
        if found == 0 or found >> 3 != kind:
            break
        position += found & 7
    return position


@kernel
def white_space_end(address, position, stop, classes):
    """The end of the pretoken that begins at white space which leads neither letters nor marks:
    all of it at the end of the text, else up to its last line end, else all but its last character, else one."""
    start = after_line_end = last = position
    while position < stop:
        found = character(address, position, stop, classes)
        if found == 0 or found >> 3 != WHITE_SPACE:
            break
        last = position
        position += found & 7
        if is_line_end(load_byte(address, last)):
            after_line_end = position
    if position == stop:
        return stop
    if after_line_end > start:
        return after_line_end
    return last if last > start else position


@kernel
def scan_cl100k(address, start, stop, classes, ends):
    """Write pretoken ends; returns count * 4 + outcome. The branches stand in the order of the pattern's
    alternatives."""
    count = 0
    position = start
    while position < stop:
        if count == ends.shape[0]:
            return count * 4 + FULL
        byte = load_byte(address, position)
        found = character(address, position, stop, classes)
        if found == 0:
            return count * 4 + INVALID
        kind, end = found >> 3, position + (found & 7)
        next_kind = WHITE_SPACE
        if end < stop:
            next_kind = character(address, end, stop, classes) >> 3
        contraction = 0
        if byte == APOSTROPHE:
            contraction = cl100k_contraction(address, position, stop)
        if contraction != 0:
            end = position + contraction
        elif kind == LETTER or (next_kind == LETTER and kind != NUMBER and not is_line_end(byte)):
            end = run_end(address, end, stop, classes, LETTER)
        elif kind == NUMBER:
            for _ in range(2):
                if end < stop:
                    following = character(address, end, stop, classes)
                    if following >> 3 == NUMBER:
                        end += following & 7
        elif kind == OTHER or (byte == SPACE and next_kind == OTHER):
            end = run_end(address, end, stop, classes, OTHER)
            if end < stop and load_byte(address, end) >= 0x80 and decode(address, end, stop, classes) == 0:
                return count * 4 + INVALID
            while end < stop and is_line_end(load_byte(address, end)):
                end += 1
        else:
            end = white_space_end(address, position, stop, classes)
        position = end
        ends[count] = end
        count += 1
    return count * 4 + SCANNED
