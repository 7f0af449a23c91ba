"""Counting pretokens: split on the special tokens, match the pattern, count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cs336_registry.components.pretoken_counter import check
from cs336_registry.text.inputs import InputPath, texts, utf8
from cs336_registry.text.patterns import GPT2_PATTERN, pretoken_finder
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import special_token_pattern


def pretoken_counter(
    input_path: InputPath, special_tokens: Sequence[str] = (), *, pattern: str = GPT2_PATTERN
) -> dict[bytes, int]:
    """One pass over the text in safe chunks; see the contract."""
    paths, special_tokens = check(input_path, special_tokens, pattern)
    find_pretokens = pretoken_finder(pattern)
    special = special_token_pattern(special_tokens)
    counts: Counter[str] = Counter()
    for text in texts(paths):
        for chunk in safe_chunks(text, pattern, special_tokens):
            # split() with a group gives text and special tokens in turn.
            for part in [chunk] if special is None else special.split(chunk)[::2]:
                counts.update(find_pretokens(part))
    return {utf8(pretoken): count for pretoken, count in counts.items()}
