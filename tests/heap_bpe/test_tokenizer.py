"""What heap_bpe's tokenizer adds: memory of pieces, batches and files in several processes."""

from __future__ import annotations

import gzip
import random

import numpy as np
import pytest
from cs336_heap_bpe import tokenizer as module
from cs336_heap_bpe.tokenizer import Tokenizer
from cs336_reference.bpe_trainer import train

from cs336_registry.components.tokenizer import NaiveTokenizer
from cs336_registry.text import samples
from tests.corpora import SPECIAL_TOKENS, english, vocabulary


@pytest.fixture
def tokenizer():
    return Tokenizer(*vocabulary(), SPECIAL_TOKENS)


def test_both_ways_of_merging_are_the_definition():
    source = random.Random(4)
    for _ in range(300):
        letters = source.choice(["a", "ab", "abc"])
        words = {"".join(source.choices(letters, k=source.choice([3, 8, 40]))).encode(): 1 for _ in range(8)}
        vocab, merges = train(words, 256 + source.choice([3, 20, 60]), (), "greatest_bytes")
        if source.random() < 0.3:
            source.shuffle(merges)
        pretoken = "".join(source.choices(letters, k=source.choice([2, 30, 200]))).encode()
        pieces = Tokenizer(vocab, merges)._pieces
        expected = NaiveTokenizer(vocab, merges).encode_pretoken(pretoken)
        assert pieces._merge_few(list(pretoken)) == expected
        assert pieces._merge_many(list(pretoken)) == expected


def test_a_very_long_pretoken_takes_no_quadratic_time(tokenizer):
    ids = tokenizer.encode("a" * 300_000)
    assert tokenizer.decode(ids) == "a" * 300_000


def test_the_memory_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "MOST_PIECES", 50)
    expected = tokenizer.encode(english(10_000))
    assert len(tokenizer._pieces) <= 50
    assert tokenizer.encode(english(10_000)) == expected
    tokenizer.encode("x" * 1000)
    assert "x" * 1000 not in tokenizer._pieces


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches(tokenizer, monkeypatch, num_workers):
    monkeypatch.setattr(module, "ONE_PROCESS_CHARACTERS", 0)
    texts = [*english(20_000).split(samples.END_OF_TEXT), "", samples.tricky(300, seed=2)]
    assert tokenizer.encode_batch(texts, num_workers=num_workers) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([], num_workers=num_workers) == []


@pytest.mark.parametrize("num_workers", [1, 3])
def test_files(tokenizer, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(module, "FILE_SHARD", 10_000)
    (tmp_path / "a.txt").write_bytes(english(70_000).encode() + samples.tricky_bytes(500, seed=1))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(english(5_000).encode()))
    arrays = list(tokenizer.encode_files([tmp_path / "a.txt", tmp_path / "b.txt.gz"], num_workers=num_workers))
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}
    assert len(arrays) > 7
    text = (tmp_path / "a.txt").read_bytes().decode("utf-8", "replace")
    assert np.concatenate(arrays).tolist() == tokenizer.encode(text) + tokenizer.encode(english(5_000))


def test_jobs_share_what_the_tokenizer_is_made_of(tokenizer, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(module, "FILE_SHARD", 1000)
    monkeypatch.setattr(module, "ONE_PROCESS_CHARACTERS", 0)
    monkeypatch.setattr(module, "_in_order", lambda target, found, workers: jobs.append(found) or [])
    (tmp_path / "a.txt").write_text(english(20_000), encoding="utf-8")
    list(tokenizer.encode_files(tmp_path / "a.txt", num_workers=2))
    tokenizer.encode_batch(["text"] * 20, num_workers=2)
    assert [len({id(state) for state, *_ in found}) for found in jobs] == [1, 1]


def test_ids_beyond_16_bits():
    built = Tokenizer({70_000: b"a", 2**33: b"b"}, [])
    assert built.id_dtype == np.uint64
    assert Tokenizer({70_000: b"a"}, []).id_dtype == np.uint32
    assert built.encode("ab") == [70_000, 2**33]
