"""Pre-tokenisation patterns: regular expressions (of the `regex` package) whose matches are the pretokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import regex

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""GPT-2's pattern, the course's default: https://github.com/openai/tiktoken, `tiktoken_ext/openai_public.py`."""

CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
"""GPT-4's pattern (cl100k_base): one mark may lead letters, numbers have up to three digits."""

PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN}


def pattern_named(name: str) -> str:
    """The pattern of that name, for command lines: `gpt2` or `cl100k`."""
    if name not in PATTERNS:
        raise ValueError(f"there is no pattern named {name!r}: choose one of {', '.join(PATTERNS)}")
    return PATTERNS[name]


def pattern_from(name_or_expression: str) -> str:
    """The pattern of that name, or the expression itself; letters alone can only be a misspelt name."""
    if name_or_expression in PATTERNS or name_or_expression.replace("_", "").replace("-", "").isalnum():
        return pattern_named(name_or_expression)
    check_pattern(name_or_expression)
    return name_or_expression


def pattern_name(pattern: str) -> str:
    """The name of a pattern, or the expression itself where it has none: `pattern_from` gives it back."""
    return next((name for name, expression in PATTERNS.items() if expression == pattern), pattern)


def check_pattern(pattern: str) -> None:
    """Refuse what can't be compiled, with the reason."""
    import regex

    if not isinstance(pattern, str):
        raise TypeError(f"pattern is {pattern!r}: it must be a string, a regular expression of the regex package")
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None


@lru_cache(maxsize=32)
def compiled(pattern: str) -> regex.Pattern[str]:
    """The compiled pattern."""
    import regex

    return regex.compile(pattern)


@lru_cache(maxsize=32)
def pretoken_finder(pattern: str) -> Callable[[str], Iterable[str]]:
    """A function from a text to its pretokens: the non-empty matches of `pattern`, left to right.

    Text that the pattern does not match belongs to no pretoken; the named patterns match everything.
    """
    expression = compiled(pattern)
    if is_streamable(pattern):
        return expression.findall
    # findall() gives groups instead of matches where the pattern has any, and a pattern may match nothing at all.
    return lambda text: (match[0] for match in expression.finditer(text) if match[0])


def is_streamable(pattern: str) -> bool:
    """Whether text can be cut safely between pretokens (see `pretokens.py`), which holds for the named patterns."""
    return pattern in PATTERNS.values()
