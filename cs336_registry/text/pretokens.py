"""Cutting text where no pretoken and no special token is: what lets text stream, and be shared out between processes.

A cut is safe when the text before it and the text after it, taken alone, give the pretokens that they give together.
The named patterns have such places all over: after a character that is not whitespace and before a space, for one. Any
other pattern may look as far back or ahead as it likes, so text is cut only where a special token has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .patterns import compiled, is_streamable
from .special_tokens import special_token_pattern

CHUNK_CHARACTERS = 1 << 16
_CONTRACTION = 3
"""Characters of the longest contraction ('ll): up to this far from its start, a pretoken may still turn into one."""


def safe_chunks(
    pieces: Iterable[str],
    pattern: str,
    special_tokens: Sequence[str] = (),
    *,
    chunk_characters: int = CHUNK_CHARACTERS,
) -> Iterator[str]:
    """The same text, cut anew: every chunk gives by itself the pretokens and special tokens that it has in the whole.

    Holds about `chunk_characters`, or one pretoken where that is longer. A pattern without safe places
    (`is_streamable`) is held up to the next special token.
    """
    special = special_token_pattern(special_tokens)
    longest = max(map(len, special_tokens), default=1)
    held: list[str] = []
    size, wanted = 0, chunk_characters
    for piece in pieces:
        if not isinstance(piece, str):
            raise TypeError(f"the iterable gave {piece!r}: it must give strings")
        held.append(piece)
        size += len(piece)
        if size < wanted:
            continue
        text = "".join(held)
        # A special token that starts before `settled` has been seen whole, with anything longer that could win over it.
        settled = max(0, len(text) - longest + 1)
        start = 0
        if special is not None:
            for match in special.finditer(text):
                if match.start() >= settled:
                    break
                start = match.end()
        cut = max(start, last_safe_cut(text, pattern, start, settled)) if start < settled else start
        if cut:
            yield text[:cut]
        held = [text[cut:]]
        size = len(held[0])
        # Where one pretoken fills the chunk, look again only after it has doubled: the work stays linear.
        wanted = max(chunk_characters, 2 * size)
    rest = "".join(held)
    if rest:
        yield rest


def last_safe_cut(text: str, pattern: str, start: int, end: int) -> int:
    """The last safe place in `text[start:end]`, which holds no special token and may go on after `end`; or `start`.

    `start` must itself be the start of a pretoken.
    """
    if not is_streamable(pattern):
        return start
    position = text.rfind(" ", start, end)
    while position > start:
        if "!" <= text[position - 1] <= "~":
            return position
        position = text.rfind(" ", start, position)
    cut = start
    for match in compiled(pattern).finditer(text, start, end):
        if match.end() >= end or match.start() + _CONTRACTION > end:
            break
        if not text[match.end() - 1].isspace():
            cut = match.end()
    return cut
