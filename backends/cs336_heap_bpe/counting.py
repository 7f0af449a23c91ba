"""Counting pretokens in two steps: cut the text into words with whatever is cheapest, count these, then match the real
pattern once for every distinct word. Words repeat, so the second step sees a few per cent of the text.

For GPT-2's pattern the first step is `str.split(" ")`, two to three times as fast as an expression. It is right once no
whitespace is followed by whitespace, so all but the last character of a longer run is taken out first: that is a
pretoken of its own, whatever follows. In the second step the words of equal count are matched together, as one text.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from cs336_registry.text.changes import changed
from cs336_registry.text.inputs import BLOCK_SIZE, decoded, utf8
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN, pretoken_finder
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import special_token_pattern
from cs336_registry.text.training_cache import WordCounts

MOST_WORDS = 2_000_000
"""Distinct words held before they are turned into pretokens: bounds the memory of texts that hardly repeat."""
WORDS_AT_ONCE = 1 << 15
"""Words matched as one text: the list of their pretokens is held beside them."""

# The characters that `\s` matches in the regex package (the Unicode property White_Space); `re` counts U+001C-1F too.
_SPACES = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ALL_SPACES = "".join(chr(code) for code in range(0x3001) if re.match(f"[{_SPACES}]", chr(code)))
_RUN_BUT_LAST = re.compile(f"([{_SPACES}](?=[{_SPACES}])[{_SPACES}]*(?=[{_SPACES}]))")
_PIECES = {
    # No pretoken has whitespace after something else: a piece is whitespace, then anything else.
    GPT2_PATTERN: rf"[{_SPACES}]+[^{_SPACES}]*|[^{_SPACES}]+",
    # Here newlines may follow punctuation within a pretoken: pieces are not cut there.
    CL100K_PATTERN: rf"(?:[{_SPACES}]+[^{_SPACES}]*|[^{_SPACES}]+)(?:(?<![0-9A-Za-z])[\r\n][{_SPACES}]*[^{_SPACES}]*)*",
}
# GPT-2's pattern where text is ASCII: `re` takes less than half the time of the regex package.
_GPT2_OF_ASCII = re.compile(
    r" ?[A-Za-z]+|'(?:[sdmt]|ll|ve|re)| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)


@lru_cache(maxsize=8)
def piece_finder(pattern: str) -> Callable[[str], Iterable[str]]:
    """Cuts text into pieces that no pretoken crosses; pretokens themselves for patterns that are not named ones."""
    return re.compile(_PIECES[pattern]).findall if pattern in _PIECES else pretoken_finder(pattern)


@lru_cache(maxsize=8)
def pretokens_of_piece(pattern: str) -> Callable[[str], Iterable[str]]:
    """The pretokens of such a piece, taken alone. What an unnamed pattern matched may not match without its context."""
    return pretoken_finder(pattern) if pattern in _PIECES else lambda piece: (piece,)


def count_texts(
    texts: Iterable[Iterable[str]], pattern: str, special_tokens: Sequence[str], most_words: int = MOST_WORDS
) -> Iterator[WordCounts]:
    """The pretokens of texts, each given in blocks: counts to be added up, of about `most_words` at most."""
    special = special_token_pattern(special_tokens)
    words = _Gpt2Words() if pattern == GPT2_PATTERN else _Pieces(pattern)
    for text in texts:
        for chunk in safe_chunks(text, pattern, special_tokens, chunk_characters=BLOCK_SIZE // 4):
            for part in [chunk] if special is None else special.split(chunk)[::2]:
                words.add(part)
            if len(words.counts) + len(words.pretokens) > most_words:
                words.settle()
                if len(words.pretokens) > most_words // 2:
                    yield words.taken()
    words.settle()
    yield words.taken()


def count_range(
    path: Path, start: int, end: int, pattern: str, special_tokens: Sequence[str], most_words: int = MOST_WORDS
) -> WordCounts:
    """The pretokens of one byte range of a plain file."""
    first, *more = count_texts([decoded(range_blocks(path, start, end))], pattern, special_tokens, most_words)
    return WordCounts.merged(part.items() for part in (first, *more)) if more else first


def range_blocks(path: Path, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end`. Raises ValueError where the file ends before them."""
    with open(path, "rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(BLOCK_SIZE, end - start))
            if not block:
                raise changed(path)
            start += len(block)
            yield block


class _Words:
    """`counts` of the words that are not matched yet, and the `pretokens` of the others."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.pretokens: Counter[str] = Counter()

    def taken(self) -> WordCounts:
        """The pretokens so far, which it forgets."""
        counts = {}
        while self.pretokens:
            pretoken, count = self.pretokens.popitem()
            counts[utf8(pretoken)] = count
        return WordCounts.of(counts)


class _Pieces(_Words):
    """Pieces of any pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._find_pieces = piece_finder(pattern)
        self._find_pretokens = pretokens_of_piece(pattern)

    def add(self, part: str) -> None:
        self.counts.update(self._find_pieces(part))

    def settle(self) -> None:
        """Turn the pieces into pretokens."""
        get = self.pretokens.get
        for piece, count in self.counts.items():
            for pretoken in self._find_pretokens(piece):
                self.pretokens[pretoken] = get(pretoken, 0) + count
        self.counts.clear()


class _Gpt2Words(_Words):
    """What a space or a newline starts, in texts of GPT-2's pattern."""

    def __init__(self) -> None:
        super().__init__()
        self._find_pretokens = pretoken_finder(GPT2_PATTERN)

    def add(self, part: str) -> None:
        text = part.rstrip(_ALL_SPACES)
        if len(text) < len(part):
            # Whitespace at the end of a text is one pretoken.
            self.pretokens[part[len(text) :]] += 1
        between = _RUN_BUT_LAST.split(text)
        self.pretokens.update(between[1::2])
        text = "".join(between[::2])
        # A newline starts a word too: the space put before it marks it, as no space stands before a newline any more.
        first, *words = text.replace("\n", " \n").split(" ")
        self.counts.update(words)
        self.pretokens.update(self._find_pretokens(first))

    def settle(self) -> None:
        """Turn the words into pretokens."""
        words_of_count: defaultdict[int, list[str]] = defaultdict(list)
        for word, count in self.counts.items():
            words_of_count[count].append(word)
        self.counts.clear()
        for count, words in words_of_count.items():
            for start in range(0, len(words), WORDS_AT_ONCE):
                self._add_pretokens(words[start : start + WORDS_AT_ONCE], count)

    def _add_pretokens(self, words: list[str], count: int) -> None:
        for is_ascii in (True, False):
            chosen = [word for word in words if word.isascii() == is_ascii]
            text = (" " + " ".join(chosen)).replace(" \n", "\n") if chosen else ""
            found = _GPT2_OF_ASCII.findall(text) if is_ascii else self._find_pretokens(text)
            if count == 1:
                self.pretokens.update(found)
                continue
            get = self.pretokens.get
            for pretoken, number in Counter(found).items():
                self.pretokens[pretoken] = get(pretoken, 0) + number * count
