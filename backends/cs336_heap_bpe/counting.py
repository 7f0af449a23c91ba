"""Counting pretokens in two steps: split at whitespace with a cheap expression and count, then match the real pattern
once for every distinct piece. Words repeat, so the second step sees a few per cent of the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from cs336_registry.text.inputs import BLOCK_SIZE, decoded, utf8
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN, pretoken_finder
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import special_token_pattern

MOST_PIECES = 2_000_000
"""Distinct pieces held before they are turned into pretokens: bounds the memory of texts that hardly repeat."""

# The characters that `\s` matches in the regex package (the Unicode property White_Space); `re` counts U+001C-1F too.
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_PIECES = {
    # No pretoken has whitespace after something else: a piece is whitespace, then anything else.
    GPT2_PATTERN: rf"[{_SPACE}]+[^{_SPACE}]*|[^{_SPACE}]+",
    # Here newlines may follow punctuation within a pretoken: pieces are not cut there.
    CL100K_PATTERN: rf"(?:[{_SPACE}]+[^{_SPACE}]*|[^{_SPACE}]+)(?:(?<![0-9A-Za-z])[\r\n][{_SPACE}]*[^{_SPACE}]*)*",
}


@lru_cache(maxsize=8)
def piece_finder(pattern: str) -> Callable[[str], Iterable[str]]:
    """Cuts text into pieces that no pretoken crosses; pretokens themselves for patterns that are not named ones."""
    return re.compile(_PIECES[pattern]).findall if pattern in _PIECES else pretoken_finder(pattern)


def count_texts(blocks: Iterable[Iterable[str]], pattern: str, special_tokens: Sequence[str]) -> Counter[str]:
    """The pretokens of texts, each given in blocks."""
    special = special_token_pattern(special_tokens)
    find_pieces = piece_finder(pattern)
    pieces: Counter[str] = Counter()
    pretokens: Counter[str] = Counter()
    for text in blocks:
        for chunk in safe_chunks(text, pattern, special_tokens, chunk_characters=BLOCK_SIZE // 4):
            for part in [chunk] if special is None else special.split(chunk)[::2]:
                pieces.update(find_pieces(part))
        if len(pieces) > MOST_PIECES:
            _add_pretokens(pretokens, pieces, pattern)
            pieces.clear()
    _add_pretokens(pretokens, pieces, pattern)
    return pretokens


def count_range(path: Path, start: int, end: int, pattern: str, special_tokens: Sequence[str]) -> dict[bytes, int]:
    """The pretokens of one byte range of a plain file."""
    counts = count_texts([decoded(range_blocks(path, start, end))], pattern, special_tokens)
    return {utf8(pretoken): count for pretoken, count in counts.items()}


def range_blocks(path: Path, start: int, end: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(start)
        while start < end and (block := file.read(min(BLOCK_SIZE, end - start))):
            start += len(block)
            yield block


def _add_pretokens(pretokens: Counter[str], pieces: Counter[str], pattern: str) -> None:
    if pattern not in _PIECES:
        pretokens.update(pieces)
        return
    find_pretokens = pretoken_finder(pattern)
    get = pretokens.get
    for piece, count in pieces.items():
        for pretoken in find_pretokens(piece):
            pretokens[pretoken] = get(pretoken, 0) + count
