"""The encoder's arrays: whole files on threads, parts of files, ids of either width, and what training left for it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from cs336_numba_bpe import tokenizer as module
from cs336_numba_bpe.tokenizer import Tokenizer

from cs336_registry.components.tokenizer import NaiveTokenizer
from cs336_registry.text import frequent_words, samples
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.training_cache import WordCounts
from tests.fuzzing import expected_counts

END = "<|endoftext|>"
BYTES = {byte: bytes((byte,)) for byte in range(256)}
MERGES = [(b" ", b"t"), (b"h", b"e"), (b" t", b"he"), (b"a", b"n"), (b"i", b"n")]


def vocabulary(first: int = 256) -> dict[int, bytes]:
    """The bytes, the merges' results from the id `first` on, and a special token."""
    results = [left + right for left, right in MERGES]
    return BYTES | {first + place: token for place, token in enumerate([*results, END.encode()])}


@pytest.fixture(scope="module")
def text() -> str:
    documents = [samples.prose(400, seed=seed) + samples.tricky(120, seed=seed) for seed in range(8)]
    return END.join(documents) + " a" * 5 + "b" * 40 + " " + "thean" * 3


@pytest.mark.parametrize("first", [256, 2**16 - 6, 2**16 - 5, 2**31 - 6], ids=["narrow", "65535", "65536", "31_bits"])
def test_ids_of_any_width(text: str, first: int, tmp_path: Path, compiled: None) -> None:
    """Pretokens of up to seven narrow ids or three wide ones stand in their slot, all others in the arena."""
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    vocab = vocabulary(first)
    ids = Tokenizer(vocab, MERGES, [END]).encode_to_array(path, num_threads=1)
    assert ids.tolist() == NaiveTokenizer(vocab, MERGES, [END], pattern=GPT2_PATTERN).encode(text)
    assert ids.dtype == (np.uint16 if first + len(MERGES) < 2**16 else np.uint32)


def test_threads_share_what_was_known_before(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    """Tables for more threads are copies of the first one; what one of them learns later changes no other."""
    monkeypatch.setattr(module, "RANGE_BYTES", 500)
    monkeypatch.setattr(module, "SEEDING_BYTES", 0)
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    built = Tokenizer(vocabulary(), MERGES, [END])
    expected = NaiveTokenizer(vocabulary(), MERGES, [END], pattern=GPT2_PATTERN).encode(text)
    for num_threads in (1, 3, 2):
        assert built.encode_to_array(path, num_threads=num_threads).tolist() == expected
    tables = [table for table, _ in built._idle]
    assert len(tables) == 3
    assert not any(np.shares_memory(one.table, other.table) for one in tables for other in tables if one is not other)


@pytest.mark.parametrize("way", ["compiled", "plain_python"])
def test_a_part_of_a_file(text: str, way: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Parts that end behind special tokens, malformed bytes in one of them, add up to the whole."""
    request.getfixturevalue(way)
    content = (text + END + "a\u00e9").encode() + b"\xff\xc3" + END.encode() + b"the \xe2\x82"
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    cuts = [0]
    while (cut := content.find(END.encode(), cuts[-1])) >= 0:
        cuts.append(cut + len(END))
    cuts.append(len(content))
    built = Tokenizer(vocabulary(), MERGES, [END])
    parts = [built.encode_range(path, begin, end) for begin, end in itertools.pairwise(cuts)]
    expected = NaiveTokenizer(vocabulary(), MERGES, [END], pattern=GPT2_PATTERN).encode(
        content.decode("utf-8", "replace")
    )
    assert np.concatenate(parts).tolist() == expected
    assert {part.dtype for part in parts} == {np.dtype(np.uint16)}


def test_the_most_frequent_words_come_first() -> None:
    counts = expected_counts(samples.prose(3000, seed=5).encode(), (), GPT2_PATTERN) | {b"x" * 256: 99, b"once": 1}
    expected = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    expected.remove(b"x" * 256)
    assert frequent_words.most_frequent(WordCounts.of(counts)) == expected
    assert frequent_words.most_frequent(WordCounts.of(counts), 7) == expected[:7]


def test_words_of_a_small_corpus_are_not_kept(tmp_path: Path) -> None:
    """Text like it is encoded before compiled code is loaded."""
    Tokenizer(vocabulary(), MERGES, [END]).keep_frequent_words(WordCounts.of({b"the": 2, b" the": 3}), tmp_path)
    assert not list(tmp_path.iterdir())
