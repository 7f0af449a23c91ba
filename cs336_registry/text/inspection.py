"""What a tokenizer learnt and how it does on text: the figures of `cs336 tokenizer inspect`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .inputs import byte_texts, decoded
from .tokenizer_folder import StoredTokenizer

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
EXAMPLES = 8
WARM_UP_BYTES = 2 << 20


@dataclass(frozen=True)
class Encoded:
    """One corpus, or its beginning, encoded. `used` are the ids that came up."""

    corpus: str
    bytes: int
    tokens: int
    seconds: float
    used: frozenset[int]

    def to_dict(self, gigabytes: int) -> dict[str, Any]:
        rate = self.bytes / self.seconds
        return {
            "corpus": self.corpus,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes / self.tokens,
            "distinct_tokens": len(self.used),
            "megabytes_per_second": rate / 1e6,
            f"hours_for_{gigabytes}_gb": gigabytes * 1e9 / rate / 3600,
        }


def bytes_of(size: str) -> int:
    """Bytes of "20MB"."""
    number = size.rstrip("BKMGbkmg ").strip()
    unit = size[len(number) :].strip().upper()
    if (
        unit not in UNITS
        or not number.replace(".", "", 1).isdecimal()
        or not (found := float(number) * UNITS[unit]) >= 1
    ):
        raise ValueError(f"{size!r} is no size: give bytes, or a number with KB, MB or GB, such as 20MB")
    return int(found)


def encoded(tokenizer: Any, corpus: str, limit: int, advance: Callable[[int], None] = lambda size: None) -> Encoded:
    """Encode the first `limit` bytes of `corpus`, block by block in one thread; the time is of encoding alone.

    The first megabytes, with which a tokenizer gets going, are encoded again for the time.
    """
    total = tokens = 0
    seconds, used = 0.0, set()
    for block in _texts(corpus, limit):
        if total < WARM_UP_BYTES:
            tokenizer.encode(block)
        start = time.perf_counter()
        ids = tokenizer.encode(block)
        seconds += time.perf_counter() - start
        size = len(block.encode("utf-8", "replace"))
        total, tokens = total + size, tokens + len(ids)
        used.update(ids)
        advance(size)
    if not tokens:
        raise ValueError(f"{corpus} has no text: pass a corpus with text in it")
    return Encoded(corpus, total, tokens, seconds, frozenset(used))


def vocabulary(stored: StoredTokenizer, tokenizer: Any, used: set[int] | None, longest: int) -> dict[str, Any]:
    """The longest tokens, and those that are dead, mojibake or parts of characters.

    Dead: not in `used`, or, where that is None, tokens whose own text is encoded otherwise.
    """
    special = {token.encode() for token in stored.special_tokens}
    learnt = {token_id: token for token_id, token in stored.vocab.items() if token not in special}
    texts = {token_id: text for token_id, token in learnt.items() if (text := _text(token)) is not None}
    if used is None:
        dead = [token_id for token_id, text in texts.items() if list(tokenizer.encode(text)) != [token_id]]
    else:
        dead = [token_id for token_id in learnt if token_id not in used]
    by_length = sorted(learnt.values(), key=lambda token: (-len(token), token))
    return {
        "tokens": len(stored.vocab),
        "merges": len(stored.merges),
        "longest": [token.decode("utf-8", "replace") for token in by_length[:longest]],
        "longest_bytes": len(by_length[0]) if by_length else 0,
        "dead": _summary(dead, learnt),
        "mojibake": _summary([token_id for token_id, text in texts.items() if is_mojibake(text)], learnt),
        "incomplete": _summary([token_id for token_id in learnt if token_id not in texts], learnt),
    }


def is_mojibake(text: str) -> bool:
    """Whether `text` holds U+FFFD, or is UTF-8 that was read as Windows-1252 or Latin-1, such as "â€™" or "Ã©"."""
    if "\ufffd" in text:
        return True
    for encoding in ("cp1252", "latin-1"):
        try:
            again = text.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
        if again != text:
            return True
    return False


def _text(token: bytes) -> str | None:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return None


def _summary(ids: list[int], vocab: dict[int, bytes]) -> dict[str, Any]:
    examples = sorted(ids, key=lambda token_id: (-len(vocab[token_id]), token_id))[:EXAMPLES]
    return {
        "count": len(ids),
        "examples": [vocab[token_id].decode("utf-8", "backslashreplace") for token_id in examples],
    }


def _texts(corpus: str, limit: int) -> Iterator[str]:
    """The first `limit` bytes of the text, in blocks of about a megabyte that end where a line does, if one does."""
    left = limit
    for blocks in byte_texts(corpus):
        held = ""
        for block in decoded(blocks):
            held += block
            if (size := _size(held)) >= left:
                yield _beginning(held, left)
                return
            if cut := held.rfind("\n") + 1:
                yield held[:cut]
                held = held[cut:]
                left -= size - _size(held)
        if held:
            yield held
            left -= _size(held)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _beginning(text: str, size: int) -> str:
    """The characters that are whole in the first `size` bytes, and one at least."""
    whole = text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore")
    return whole or text[:1]
