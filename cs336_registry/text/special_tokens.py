"""Special tokens: strings such as `<|endoftext|>` that text is split on and that no merge crosses.

Where several match at one place, the longest wins, so tokens may overlap or contain one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex


def check_special_tokens(special_tokens: Iterable[str] | None) -> tuple[str, ...]:
    """The tokens as a tuple, in the order given; refuses what can't be a special token."""
    if isinstance(special_tokens, str | bytes):
        raise TypeError(f"special_tokens is {special_tokens!r}: put it in a list, [{special_tokens!r}]")
    tokens = tuple(special_tokens or ())
    seen: set[str] = set()
    for position, token in enumerate(tokens):
        if not isinstance(token, str):
            raise TypeError(
                f"special_tokens[{position}] is {token!r}: special tokens are strings, such as '<|endoftext|>'"
            )
        if not token:
            raise ValueError(
                f"special_tokens[{position}] is '': a special token needs at least one character; leave it out"
            )
        if token in seen:
            raise ValueError(f"special token {token!r} is given twice: name each once")
        if any("\ud800" <= character <= "\udfff" for character in token):
            raise ValueError(
                f"special token {token!r} has a lone surrogate, which UTF-8 can't hold: use other characters"
            )
        seen.add(token)
    return tokens


def special_token_pattern(special_tokens: Sequence[str]) -> regex.Pattern[str] | None:
    """Matches any of the tokens, longest first, as group 1 (so `split` keeps them); None where there are none."""
    import regex

    if not special_tokens:
        return None
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")")
