"""Byte-pair training as Sennrich et al. give it: count pairs once, then keep the counts up to date merge by merge."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

from cs336_registry.components.bpe_trainer import TieBreak, check, check_counts, initial_vocab
from cs336_registry.text.inputs import InputPath
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.vocab_files import BYTES_IN_CHARACTER_ORDER, Merges, Vocab

from .pretoken_counter import pretoken_counter

Pair = tuple[bytes, bytes]


def bpe_trainer(
    input_path: InputPath,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    tie_break: TieBreak = "greatest_bytes",
) -> tuple[Vocab, Merges]:
    """Pair counts with an index from each pair to the words that hold it; see the contract."""
    paths, special_tokens = check(input_path, vocab_size, special_tokens, pattern, tie_break)
    pretoken_counts = pretoken_counter(paths, special_tokens, pattern=pattern)
    check_counts(pretoken_counts, input_path)
    return train(pretoken_counts, vocab_size, special_tokens, tie_break)


def train(
    pretoken_counts: Mapping[bytes, int], vocab_size: int, special_tokens: Sequence[str], tie_break: TieBreak
) -> tuple[Vocab, Merges]:
    vocab = initial_vocab(special_tokens)
    known = set(vocab.values())
    # The order of ids in which "smallest_ids" compares: the bytes first, then each new token.
    number = {bytes((byte,)): position for position, byte in enumerate(BYTES_IN_CHARACTER_ORDER)}
    words = [[bytes((byte,)) for byte in pretoken] for pretoken in pretoken_counts]
    counts = list(pretoken_counts.values())

    pair_counts: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(zip(words, counts, strict=True)):
        for pair in pairwise(word):
            pair_counts[pair] += count
            words_with[pair].add(index)

    merges: Merges = []
    while len(vocab) < vocab_size and pair_counts:
        pair = most_frequent_pair(pair_counts, tie_break, number)
        token = pair[0] + pair[1]
        merges.append(pair)
        if token not in known:
            known.add(token)
            vocab[len(vocab)] = token
        number.setdefault(token, len(number))
        for index in words_with.pop(pair):
            before, after = words[index], merged(words[index], pair)
            for old in pairwise(before):
                pair_counts[old] -= counts[index]
                if not pair_counts[old]:
                    del pair_counts[old]
            for new in pairwise(after):
                pair_counts[new] += counts[index]
                words_with[new].add(index)
            words[index] = after
    return vocab, merges


def most_frequent_pair(pair_counts: Counter[Pair], tie_break: TieBreak, number: Mapping[bytes, int]) -> Pair:
    highest = max(pair_counts.values())
    tied = [pair for pair, count in pair_counts.items() if count == highest]
    if tie_break == "greatest_bytes":
        return max(tied)
    return min(tied, key=lambda pair: (number[pair[0]], number[pair[1]]))


def merged(word: Sequence[bytes], pair: Pair) -> list[bytes]:
    """`word` with every occurrence of `pair` joined, from left to right."""
    tokens: list[bytes] = []
    position = 0
    while position < len(word):
        if word[position] == pair[0] and position + 1 < len(word) and word[position + 1] == pair[1]:
            tokens.append(pair[0] + pair[1])
            position += 2
        else:
            tokens.append(word[position])
            position += 1
    return tokens
