"""Fuzzing the compiled engine against the contracts' oracles, on the input of `tests/fuzzing.py`."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import cs336_numba_bpe.corpus
import cs336_numba_bpe.tokenizer
import numpy as np
from cs336_numba_bpe import blocks
from cs336_numba_bpe.character_classes import load_character_classes
from cs336_numba_bpe.compile_cache import default_cache_folder, load_kernels
from cs336_numba_bpe.corpus import COMPILED_PATTERNS
from cs336_numba_bpe.count_table import CountTable, WordCounts
from cs336_numba_bpe.merge_engine import MergeEngine
from cs336_numba_bpe.special_token_table import build_special_token_table
from cs336_numba_bpe.text_buffer import TextBuffer

from cs336_registry.components.tokenizer import NaiveTokenizer
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


def counted(content: bytes, special_tokens: tuple[str, ...], pattern: str, block_bytes: int) -> dict[bytes, int]:
    """Counts from the compiled scanner, fed in blocks."""
    special = build_special_token_table(special_tokens)
    classes = load_character_classes(default_cache_folder())
    table = CountTable(load_kernels("count"), COMPILED_PATTERNS[pattern], special, classes, bits=6)
    buffer = TextBuffer(table, always_decode=special.need_decoded_text, block_bytes=block_bytes)
    for start in range(0, len(content), block_bytes):
        buffer.append(content[start : start + block_bytes])
        buffer.settle(False)
    buffer.settle(True)
    return table.words()[0].to_dict()


def check_counting(seed: int) -> None:
    source = random.Random(seed)
    content, special_tokens = random_bytes(source), random_special_tokens(source)
    pattern, block = source.choice(PATTERNS), source.choice((1, 2, 3, 7, 16, 63, 64, 65, 128, 1000, 1 << 20))
    found, expected = (
        counted(content, special_tokens, pattern, block),
        expected_counts(content, special_tokens, pattern),
    )
    different = {word: (found.get(word), expected.get(word)) for word in found.keys() | expected.keys()}
    different = {word: counts for word, counts in different.items() if counts[0] != counts[1]}
    assert not different, f"seed {seed}: {content!r} with {special_tokens}, blocks of {block}: {different}"


def engine_merges(engine: MergeEngine) -> list[tuple[bytes, bytes, int]]:
    tokens = engine.tokens()
    return [(tokens[left], tokens[right], count) for left, right, count in engine.merge_rows()]


def check_merging(seed: int) -> None:
    """All merges with their counts; with tiny arrays that must grow, in strides, with wide places, and replayed."""
    source = random.Random(seed)
    words, num_merges = random_words(source), source.choice((1, 5, 30, 120))
    tie_break = source.choice(("greatest_bytes", "smallest_ids"))
    engine = MergeEngine(WordCounts.from_dict(words), 256 + num_merges, tie_break=tie_break, wide=source.random() < 0.3)
    if source.random() < 0.3:
        for name in ("found", "found_left", "found_right", "heap_counts", "heap_rows"):
            setattr(engine, name, blocks.zeros(getattr(engine, name).format, 2))
        engine.token_bytes = blocks.of("B", bytes(range(256)))
    for stop in range(1, num_merges, source.choice((1, 3, 1000))):
        engine.run(stop)
    engine.run(num_merges)
    expected = naive_merges(words, num_merges, tie_break)
    assert engine_merges(engine) == expected, f"seed {seed}: {tie_break}, {words}"
    tokens = engine.tokens()
    assert len(set(tokens)) == len(tokens), f"seed {seed}: two merges made the same bytes"
    kept = source.randrange(len(expected) + 1)
    resumed = MergeEngine(WordCounts.from_dict(words), 256 + num_merges, tie_break=tie_break)
    resumed.replay([merge[:2] for merge in expected[:kept]])
    resumed.run(num_merges)
    assert engine_merges(resumed) == expected, f"seed {seed}: differs when resumed after {kept} merges"


def check_encoding(seed: int) -> None:
    """encode, encode_iterable and encode_to_array against the definition."""
    source = random.Random(seed)
    vocab, merges = random_vocabulary(source)
    special_tokens, pattern = random_special_tokens(source), source.choice(PATTERNS)
    tokenizer = cs336_numba_bpe.tokenizer.Tokenizer(vocab, merges, special_tokens, pattern=pattern)
    content = random_bytes(source)
    text = content.decode("utf-8", "replace")
    expected = NaiveTokenizer(vocab, merges, special_tokens, pattern=pattern).encode(text)
    what = f"seed {seed}: {text!r} with {special_tokens}"
    assert tokenizer.encode(text) == expected, what
    size = source.choice((1, 3, 50))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(tokenizer.encode_iterable(pieces)) == expected, f"{what}, in pieces of {size}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_bytes(content)
        ids = tokenizer.encode_to_array(path, num_threads=source.choice((1, 2)))
    assert ids.tolist() == expected, f"{what}, from a file"
    assert ids.dtype == (np.uint16 if max(tokenizer.vocab) < 1 << 16 else np.uint32)


if __name__ == "__main__":
    cs336_numba_bpe.corpus.WARM_BYTES = cs336_numba_bpe.corpus.COLD_BYTES = 0
    cs336_numba_bpe.tokenizer.RANGE_BYTES = 40
    run(check_counting, check_merging, check_encoding)
