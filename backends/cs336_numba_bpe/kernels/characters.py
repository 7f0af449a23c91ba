"""UTF-8 text as characters of classes: one at a time, and as masks of 64 bytes."""

from __future__ import annotations

from numba import uint64

from ..character_classes import LETTER, NUMBER, WHITE_SPACE
from .intrinsics import bit, helper, kernel, load_byte, lowest_bit

ZERO, ONE, ALL = uint64(0), uint64(1), uint64(0xFFFFFFFFFFFFFFFF)
SPACE, APOSTROPHE, NEWLINE, RETURN = ord(" "), ord("'"), ord("\n"), ord("\r")


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
def mask_high_bytes(address, block, stop, classes, high, leads, letters, numbers, others, white):
    """Masks of the bytes >= 0x80 among the 64 at `block`, by the class of their character: letters, numbers, others,
    white space; the white space that no other follows (but for the end); and the same four for the next block's bytes.

    high, leads: masks of those bytes and of first bytes of characters. letters to white: what the block before gave for
    this one. Bytes that are not UTF-8 are missing in all masks.
    """
    last_white = next_letters = next_numbers = next_others = next_white = ZERO
    while leads != ZERO:
        offset = lowest_bit(leads)
        leads &= leads - ONE
        decoded = decode(address, block + offset, stop, classes)
        if decoded == 0:
            break
        length = decoded & 7
        body = bit(length) - ONE
        here = body << uint64(offset)
        beyond = ZERO
        if offset + length > 64:
            beyond = body >> uint64(64 - offset)
        kind = decoded >> 3
        if kind == LETTER:
            letters |= here
            next_letters = beyond
        elif kind == NUMBER:
            numbers |= here
            next_numbers = beyond
        elif kind == WHITE_SPACE:
            white |= here
            next_white = beyond
            after = block + offset + length
            if after < stop and not starts_white_space(address, after, stop, classes):
                last_white |= bit(offset)
        else:
            others |= here
            next_others = beyond
    return letters, numbers, others, white, last_white, next_letters, next_numbers, next_others, next_white
