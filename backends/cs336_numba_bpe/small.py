"""The same algorithms in plain Python, for inputs that are done sooner than compiled code is loaded or made."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from cs336_registry.text.inputs import texts
from cs336_registry.text.patterns import pretoken_finder
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import special_token_pattern
from cs336_registry.text.vocab_files import BYTES_IN_CHARACTER_ORDER

Pair = tuple[int, int]


def count_pretokens(paths: Iterable, special_tokens: Sequence[str], pattern: str) -> dict[bytes, int]:
    """Pretokens and their counts, by `regex`; any pattern."""
    find, special = pretoken_finder(pattern), special_token_pattern(special_tokens)
    counts: Counter[str] = Counter()
    for text in texts(list(paths)):
        for chunk in safe_chunks(text, pattern, special_tokens):
            for part in [chunk] if special is None else special.split(chunk)[::2]:
                counts.update(find(part))
    return {pretoken.encode(): count for pretoken, count in counts.items()}


class _Greatest:
    """Orders heap entries: the greater pair of byte strings comes first."""

    __slots__ = ("pair",)

    def __init__(self, pair: tuple[bytes, bytes]) -> None:
        self.pair = pair

    def __lt__(self, other: _Greatest) -> bool:
        return self.pair > other.pair


def train_merges(counts: Mapping[bytes, int], num_merges: int, tie_break: str) -> list[tuple[bytes, bytes]]:
    """Merges in order, from a heap of pairs with lazily updated counts."""
    tokens = [bytes((byte,)) for byte in range(256)]
    number = {byte: place for place, byte in enumerate(BYTES_IN_CHARACTER_ORDER)}
    words = [list(word) for word in counts]
    word_counts = list(counts.values())
    pair_counts: defaultdict[Pair, int] = defaultdict(int)
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pair_counts[pair] += word_counts[index]
            words_with[pair].add(index)

    def entry(pair: Pair) -> tuple:
        if tie_break == "greatest_bytes":
            return -pair_counts[pair], _Greatest((tokens[pair[0]], tokens[pair[1]])), pair
        return -pair_counts[pair], (number.get(pair[0], pair[0]), number.get(pair[1], pair[1])), pair

    heap = [entry(pair) for pair in pair_counts]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while heap and len(merges) < num_merges:
        negative_count, _, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count != -negative_count:
            if count:
                heapq.heappush(heap, entry(pair))
            continue
        if not count:
            continue
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        result = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        risen: set[Pair] = set()
        for index in words_with.pop(pair):
            before = words[index]
            after = words[index] = joined(before, pair, result)
            for old in pairwise(before):
                pair_counts[old] -= word_counts[index]
            for new in pairwise(after):
                pair_counts[new] += word_counts[index]
                words_with[new].add(index)
                if result in new:
                    risen.add(new)
        for new in risen:
            heapq.heappush(heap, entry(new))
    return merges


def joined(word: Sequence[int], pair: Pair, result: int) -> list[int]:
    """`word` with every occurrence of `pair` replaced by `result`, from left to right."""
    left, right = pair
    tokens: list[int] = []
    position, last = 0, len(word) - 1
    while position <= last:
        if word[position] == left and position < last and word[position + 1] == right:
            tokens.append(result)
            position += 2
        else:
            tokens.append(word[position])
            position += 1
    return tokens
