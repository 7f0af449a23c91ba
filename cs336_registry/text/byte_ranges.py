r"""Cutting a file into byte ranges that can be counted alone: no pretoken and no special token crosses a cut.

In the named patterns nothing holds white space behind anything else, but for cl100k's line ends after marks, and no
alternative looks back. So a cut is safe behind a visible character and before a space or, in GPT-2's pattern, a
newline; in cl100k's a newline only behind a letter or a number (here: an ASCII one). There it is safe behind a newline,
too, before a visible character: `\s*[\r\n]` gives in the middle what `\s++$` gives at the end, and marks keep their
line ends. A visible character is whole in UTF-8, so it decodes alike whatever bytes come before and after it.

For any other pattern a cut lies at the end of a special token. Ranges do not depend on the number of workers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from .patterns import CL100K_PATTERN, GPT2_PATTERN

WINDOW = 1 << 12
_WIDE = (
    rb"[\xc2-\xdf][\x80-\xbf]",
    rb"(?:\xe0[\xa0-\xbf]|\xed[\x80-\x9f]|[\xe1-\xec\xee\xef][\x80-\xbf])[\x80-\xbf]",
    rb"(?:\xf0[\x90-\xbf]|\xf4[\x80-\x8f]|[\xf1-\xf3][\x80-\xbf])[\x80-\xbf]{2}",
)
"""The characters of two, three and four bytes: https://www.unicode.org/versions/latest, table 3-7."""
_BLANK = (rb"\xc2[\x80-\xa0]", rb"\xe1\x9a\x80|\xe1\xa0\x8e|\xe2\x80[\x80-\x8f\xa8-\xaf]|\xe2\x81\x9f|\xe3\x80\x80")
"""White space among them, of all versions of Unicode, with some neighbours; no character of four bytes is."""
_VISIBLE = rb"(?:[!-~]|(?!%s)(?:%s))" % (b"|".join(_BLANK), b"|".join(_WIDE))
_BEHIND_VISIBLE = rb"(?:(?<=[!-~][ \n])|(?:%s)%s)" % (
    b"|".join(rb"(?<=(?:%s)[ \n])" % character for character in _WIDE),
    b"".join(rb"(?<!(?:%s)[ \n])" % character for character in _BLANK),
)
# They begin with the space or newline, which is found fast. An empty group stands where the cut lies behind it.
_SAFE = {
    GPT2_PATTERN: re.compile(rb"[ \n]%s" % _BEHIND_VISIBLE),
    CL100K_PATTERN: re.compile(rb"[ \n](?:(?<= )%s|(?<=[0-9A-Za-z]\n)|(?<=\n)(?=%s)())" % (_BEHIND_VISIBLE, _VISIBLE)),
}
_REPLACEMENT_CHARACTER = "\ufffd"

FindCut = Callable[[bytes, int, int, Sequence[bytes]], int | None]


def byte_ranges(path: Path, pattern: str, special_tokens: Sequence[str], range_bytes: int) -> list[tuple[int, int]]:
    """The file as (start, end) ranges of about `range_bytes`, in order; longer ones where there is no safe cut."""
    size = path.stat().st_size
    # Broken UTF-8 may decode to the replacement character, so such a token can't be looked for among bytes.
    if size <= range_bytes or any(_REPLACEMENT_CHARACTER in token for token in special_tokens):
        return [(0, size)]
    tokens = [token.encode() for token in special_tokens]
    find_cut = partial(_safe_place, _SAFE[pattern]) if pattern in _SAFE else _end_of_special_token
    cuts = [0]
    with open(path, "rb") as file:
        while cuts[-1] + range_bytes < size:
            cut = _first_cut(file, cuts[-1] + range_bytes, size, tokens, find_cut)
            if cut is None or cut >= size:
                break
            cuts.append(cut)
    return list(zip(cuts, [*cuts[1:], size], strict=True))


def _first_cut(file: IO[bytes], offset: int, size: int, tokens: Sequence[bytes], find_cut: FindCut) -> int | None:
    """The first cut after `offset`, looked for in windows that overlap by what surrounds a cut."""
    # Twice, for a token may stand on either side of the place; a character has up to four bytes.
    margin = 2 * max((4, *map(len, tokens)))
    while True:
        start = max(0, offset - margin)
        file.seek(start)
        content = file.read(WINDOW + 3 * margin)
        # A short read: the file lost bytes since it was measured, which whoever reads its ranges reports.
        is_last = start + len(content) >= size or len(content) < WINDOW + 3 * margin
        # A token that begins near the window's end may go on beyond it, unless the file ends there.
        reach = len(content) if is_last else len(content) - margin
        cut = find_cut(content, offset - start, reach, tokens)
        if cut is not None:
            return start + cut
        if is_last:
            return None
        offset = start + reach - margin


def _safe_place(safe: re.Pattern[bytes], content: bytes, begin: int, reach: int, tokens: Sequence[bytes]) -> int | None:
    for match in safe.finditer(content, begin + 1, reach):
        cut = match.end() if match.lastindex else match.start()
        # Any occurrence in the slice has bytes on both sides of the cut.
        if not any(token in content[max(0, cut - len(token) + 1) : cut + len(token) - 1] for token in tokens):
            return cut
    return None


def _end_of_special_token(content: bytes, begin: int, reach: int, tokens: Sequence[bytes]) -> int | None:
    """The end of a special token that is surely matched: none in its way starts earlier, or as early and is longer."""
    places = sorted((start, start + len(token)) for token in tokens for start in _occurrences(content, token))
    for start, end in places:
        if start < begin or end > reach:
            continue
        rivals = (other for other in places if other != (start, end) and other[0] <= start < other[1])
        if all(other[0] == start and other[1] < end for other in rivals):
            return end
    return None


def _occurrences(content: bytes, token: bytes) -> Iterator[int]:
    start = content.find(token)
    while start >= 0:
        yield start
        start = content.find(token, start + 1)
