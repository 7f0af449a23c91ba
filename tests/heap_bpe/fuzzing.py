"""Fuzzing heap_bpe against the contracts' oracles, on the input of `tests/fuzzing.py`."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from cs336_heap_bpe import counting, pair_merger, word_layout
from cs336_heap_bpe import tokenizer as tokenizer_module
from cs336_heap_bpe.bpe_trainer import train
from cs336_heap_bpe.pair_merger import PairMerger
from cs336_heap_bpe.tokenizer import Tokenizer

from cs336_registry.components.tokenizer import NaiveTokenizer
from cs336_registry.text import byte_ranges
from cs336_registry.text.training_cache import WordCounts
from tests.fuzzing import (
    PATTERNS,
    expected_counts,
    naive_merges,
    random_bytes,
    random_special_tokens,
    random_vocabulary,
    random_words,
    run,
)

OWN_PATTERN = r"\S+|\s{1,3}(?=\S)|\s"
"""One that is no named pattern: it is cut at special tokens alone."""


def check_counting(seed: int) -> None:
    """A file in ranges, read in small blocks, words given away early."""
    source = random.Random(seed)
    content, special_tokens = random_bytes(source), random_special_tokens(source)
    pattern = source.choice((*PATTERNS, OWN_PATTERN))
    range_bytes, block, most_words = source.choice((1, 7, 60, 1 << 20)), source.choice((4, 40, 1 << 20)), 1 << 20
    range_bytes = max(range_bytes, len(content) // 30)
    if source.random() < 0.3:
        most_words = source.randrange(20)
    found: Counter[bytes] = Counter()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "BLOCK_SIZE", block)
        patch.setattr(counting, "WORDS_AT_ONCE", source.choice((1, 5, 1 << 15)))
        patch.setattr(byte_ranges, "WINDOW", source.choice((1, 16, 1 << 16)))
        path = Path(folder, "text.txt")
        path.write_bytes(content)
        for start, end in byte_ranges.byte_ranges(path, pattern, special_tokens, range_bytes):
            found.update(counting.count_range(path, start, end, pattern, special_tokens, most_words).to_dict())
    expected = expected_counts(content, special_tokens, pattern)
    different = {word: (found[word], expected.get(word, 0)) for word in found.keys() | expected.keys()}
    different = {word: counts for word, counts in different.items() if counts[0] != counts[1]}
    what = f"seed {seed}: {content!r} with {special_tokens}, ranges of {range_bytes}, blocks of {block}"
    assert not different, f"{what}: {different}"


def check_merging(seed: int) -> None:
    """Merges whatever the thresholds and the sizes of arrays are, and taken up again in the middle."""
    source = random.Random(seed)
    words, num_merges = random_words(source), source.choice((1, 5, 30, 120))
    tie_break = source.choice(("greatest_bytes", "smallest_ids"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_merger, "FIRST_THRESHOLD_DIVISOR", source.choice((1, 2, 64)))
        patch.setattr(pair_merger, "FEW", source.choice((0, 3, 48)))
        patch.setattr(pair_merger, "LATER_THRESHOLD_DIVISOR", source.choice((2, 6)))
        patch.setattr(word_layout, "MOST_BUCKETS", source.choice((7, 1 << 12)))
        patch.setattr(word_layout, "SCAN_BLOCK", source.choice((5, 50, 1 << 21)))
        expected = [merge[:2] for merge in naive_merges(words, num_merges, tie_break)]
        _, merges = train(WordCounts.of(words), 256 + num_merges, (), tie_break)
        assert merges == expected, f"seed {seed}: {tie_break}, {words}"
        kept = source.randrange(len(expected) + 1)
        merger = PairMerger(WordCounts.of(words), tie_break)
        merger.replay(expected[:kept])
        for merge in expected[kept:]:
            pair, _ = merger.next_pair()
            assert merger.merge(pair) == merge, f"seed {seed}: differs when resumed after {kept} merges"


def check_encoding(seed: int) -> None:
    """encode, encode_iterable and encode_files against the definition."""
    source = random.Random(seed)
    vocab, merges = random_vocabulary(source)
    special_tokens, pattern = random_special_tokens(source), source.choice((*PATTERNS, OWN_PATTERN))
    tokenizer = Tokenizer(vocab, merges, special_tokens, pattern=pattern)
    content = random_bytes(source)
    text = content.decode("utf-8", "replace")
    expected = NaiveTokenizer(vocab, merges, special_tokens, pattern=pattern).encode(text)
    what = f"seed {seed}: {text!r} with {special_tokens}"
    assert tokenizer.encode(text) == expected, what
    size = source.choice((1, 3, 50))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(tokenizer.encode_iterable(pieces)) == expected, f"{what}, in pieces of {size}"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "FILE_SHARD", 40)
        path = Path(folder, "text.txt")
        path.write_bytes(content)
        ids = [token_id for array in tokenizer.encode_files(path, num_workers=1) for token_id in array.tolist()]
    assert ids == expected, f"{what}, from a file"


if __name__ == "__main__":
    run(check_counting, check_merging, check_encoding)
