"""Where text may be cut without changing its pretokens, and where special tokens stand.

A cut is safe before white space (GPT-2) or before a space, or a line end after a letter or number (cl100k), when the
character in front is not white space. No alternative of these patterns holds white space behind anything else, but for
cl100k's line ends after marks; so a pretoken ends there whatever comes. The left part ends in a character that is not
white space, so no `\\s+(?!\\S)` or `\\s+$` touches the cut, and no alternative looks back.
"""

from __future__ import annotations

from ..character_classes import LETTER, NUMBER, WHITE_SPACE
from ..constants import GPT2
from .characters import NEWLINE, ONE, SPACE, ZERO, character
from .intrinsics import helper, kernel, load_byte, lowest_bit, two_byte_mask


@helper
def class_before(address, start, position, classes):
    """The class of the character that ends at `position`; white space (which forbids a cut) where that is not clear."""
    first = position - 1
    while first > start and position - first < 4 and (load_byte(address, first) & 0xC0) == 0x80:
        first -= 1
    found = character(address, first, position, classes)
    if found == 0 or first + (found & 7) != position:
        return WHITE_SPACE
    return found >> 3


@kernel
def last_safe_cut(address, start, stop, pattern, classes):
    """The last place in (start, stop] where the text may be cut, or `start`. The byte at `stop` must be there to
    see."""
    position = stop
    while position > start:
        byte = load_byte(address, position)
        if byte in (SPACE, NEWLINE):
            kind = class_before(address, start, position, classes)
            if kind != WHITE_SPACE and (pattern == GPT2 or byte == SPACE or kind in (LETTER, NUMBER)):
                return position
        position -= 1
    return start


@kernel
def special_token_at(address, position, stop, first_byte_starts, token_starts, token_bytes):
    """The index of the longest special token at `position` that ends by `stop`, or -1. Tokens are grouped by their
    first byte (`first_byte_starts`), the longest first."""
    first = load_byte(address, position)
    for index in range(first_byte_starts[first], first_byte_starts[first + 1]):
        begin = token_starts[index]
        length = token_starts[index + 1] - begin
        if position + length <= stop:
            matched = 1
            while matched < length and load_byte(address, position + matched) == token_bytes[begin + matched]:
                matched += 1
            if matched >= length:
                return index
    return -1


@kernel
def next_special_token(address, position, limit, stop, byte_pairs, first_byte_starts, token_starts, token_bytes):
    """start * 2**20 + index of the first special token that starts before `limit`, or -1.

    `byte_pairs` lists the distinct first two bytes of all tokens (-1: one byte), which 64 places are searched for at
    once; it is empty where there are too many to be worth it.
    """
    if byte_pairs.shape[0] == 0:
        while position < limit:
            first = load_byte(address, position)
            if first_byte_starts[first] != first_byte_starts[first + 1]:
                index = special_token_at(address, position, stop, first_byte_starts, token_starts, token_bytes)
                if index >= 0:
                    return (position << 20) | index
            position += 1
        return -1
    while position < limit:
        candidates = ZERO
        for pair in range(byte_pairs.shape[0] // 2):
            candidates |= two_byte_mask(address, position, byte_pairs[2 * pair], byte_pairs[2 * pair + 1])
        while candidates != ZERO:
            start = position + lowest_bit(candidates)
            candidates &= candidates - ONE
            if start >= limit:
                return -1
            index = special_token_at(address, start, stop, first_byte_starts, token_starts, token_bytes)
            if index >= 0:
                return (start << 20) | index
        position += 64
    return -1
