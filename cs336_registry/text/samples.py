"""Seeded text for cases, laws and tests: what looks like prose, and strings made of everything that goes wrong."""

from __future__ import annotations

import random
from itertools import accumulate

END_OF_TEXT = "<|endoftext|>"

_SYLLABLES = (
    "ba be bi bo da de di do fa fo ga go ka ki la le li lo ma me mi mo na ne no ra re ri ro sa se si so ta te ti to"
)
_ENDINGS = ("", "", "", "n", "s", "r", "ing", "ed", "tion", "ly", "'s", "'ll", "n't", "'ve", "'re", "'d", "'m")
_MARKS = (", ", ". ", ". ", "? ", "! ", "; ", ": ", ' "', '" ', " (", ") ", " — ", "...\n", "\n\n", ".\r\n", "’s ")
_RARE = (
    "naïve",
    "Straße",
    "東京",
    "日本語",
    "привет",
    "مرحبا",
    "שלום",
    "x²",
    "٣٤",
    "1984",
    "3.14",
    "🙂",
    "👩‍👩‍👧",
    "e\u0301",
    "ﬁ",
    "𝔘𝟘",
)

TRICKY = (
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680"),
    *(
        "\u2003",
        "\u2028",
        "\u202f",
        "\u205f",
        "\u3000",
        "\u200b",
        "\u200d",
        "\ufeff",
        "\x00",
        "\x7f",
        "\ufffd",
        "\U0010ffff",
    ),
    *(
        "'",
        "’",
        "'s",
        "'S",
        "'ſ",
        "'t",
        "'re",
        "'ve",
        "'m",
        "'ll",
        "'LL",
        "'d",
        "'l",
        "l",
        "v",
        "e",
        "r",
        "s",
        "''",
        "’s",
    ),
    *("a", "aa", "aaaa", "Z", "é", "e\u0301", "ß", "ﬁ", "日本", "한", "ش", "𝔘", "ǅ", "ª", "_", "word", "quick brown"),
    *("1", "12", "123", "1234", "٣", "½", "²", "Ⅷ", "𝟘", ".", "…", "...", "—", "“", "$", "+", "://", "😀", "👩‍👩‍👧"),
    *("<", ">", "|", "<|", "|>", "<|endoftext", END_OF_TEXT, "<|pad|>"),
)
"""Pieces whose joins cross every class boundary of the patterns; two of them are the special tokens of the cases."""

INVALID_UTF8 = (
    b"\xff",
    b"\xc3",
    b"\xe2\x82",
    b"\xf0\x9f\x98",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\x80",
    b"\xf8\x88\x80\x80\x80",
)
"""Byte strings that are no UTF-8: lone leads, cut sequences, a surrogate, an overlong form, a stray continuation."""


def prose(words: int, *, seed: int = 0, documents: int = 1, separator: str = END_OF_TEXT) -> str:
    """About `words` words of Zipf-like frequency, in `documents` documents with `separator` between them."""
    source = random.Random(seed)
    syllables = _SYLLABLES.split()
    vocabulary = [
        "".join(source.choices(syllables, k=source.choice((1, 1, 2, 2, 3)))) + source.choice(_ENDINGS)
        for _ in range(max(50, words // 8))
    ]
    cumulative = list(accumulate(1 / (rank + 2) for rank in range(len(vocabulary))))
    texts = []
    for _ in range(documents):
        chosen = source.choices(vocabulary, cum_weights=cumulative, k=max(1, words // documents))
        for position in range(len(chosen)):
            if source.random() < 0.03:
                chosen[position] = source.choice(_RARE)
            if source.random() < 0.1:
                chosen[position] = chosen[position].capitalize()
        texts.append("".join(word + (source.choice(_MARKS) if source.random() < 0.15 else " ") for word in chosen))
    return separator.join(texts)


def tricky(pieces: int, *, seed: int = 0) -> str:
    """A string of `pieces` pieces of `TRICKY`, some of them repeated."""
    source = random.Random(seed)
    return "".join(source.choice(TRICKY) * source.choice((1, 1, 1, 2, 3)) for _ in range(pieces))


def tricky_bytes(pieces: int, *, seed: int = 0) -> bytes:
    """Like `tricky`, with malformed UTF-8 in between."""
    source = random.Random(seed)
    tricky_pieces = [piece.encode() for piece in TRICKY]
    return b"".join(source.choice(INVALID_UTF8 if source.random() < 0.2 else tricky_pieces) for _ in range(pieces))
