"""The cache: found by content, never trusted when damaged."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest

from cs336_registry.text import shards
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN
from cs336_registry.text.training_cache import TrainingCache, WordCounts, dataset_name, file_identity, identify

COUNTS = {b" the": 3, b"a": 2**40, b"\xff\xe6": 1, b"": 4}
MERGES = [(b"t", b"h"), (b"\xe6", b"\x97"), (b" ", b"th")]
VOCAB = {0: b"<|endoftext|>", 1: b"th", 2: b"\xe6\x97"}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "my corpus.v2.txt"
    path.write_text("text " * 1000)
    return path


@pytest.fixture
def cache(tmp_path, corpus):
    return TrainingCache(tmp_path / "cache", [corpus], identify([corpus], ["<|endoftext|>"], GPT2_PATTERN))


def test_word_counts_come_back_sorted(cache):
    assert cache.load_word_counts() is None
    cache.save_word_counts(WordCounts.of(COUNTS))
    kept = cache.load_word_counts()
    assert kept.to_dict() == COUNTS
    assert list(kept.to_dict()) == sorted(COUNTS)
    assert kept.counts.dtype == np.int64


def test_shards_are_dropped_once_the_total_is_kept(cache):
    shard = cache.identity.shard(0, 0, 100)
    cache.save_shard(shard, WordCounts.of(COUNTS))
    assert cache.load_shard(shard).to_dict() == COUNTS
    cache.save_word_counts(WordCounts.of(COUNTS))
    assert cache.load_shard(shard) is None


def test_shards_of_a_run_killed_while_it_dropped_them_are_dropped_by_the_next(cache, monkeypatch):
    shard = cache.identity.shard(0, 0, 100)
    cache.save_shard(shard, WordCounts.of(COUNTS))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingCache, "_drop_shards", interrupted)
        cache.save_word_counts(WordCounts.of(COUNTS))
    assert cache.load_shard(shard) is not None
    assert cache.load_word_counts().to_dict() == COUNTS
    assert cache.load_shard(shard) is None


def interrupted(cache):
    raise KeyboardInterrupt


def test_shards_stay_while_the_total_is_damaged(cache, caplog):
    shard = cache.identity.shard(0, 0, 100)
    cache.save_word_counts(WordCounts.of(COUNTS))
    cache.save_shard(shard, WordCounts.of(COUNTS))
    (total,) = cache.folder.glob("word_counts_*")
    total.write_bytes(total.read_bytes()[:-1])
    assert cache.load_word_counts() is None
    assert cache.load_shard(shard) is not None
    assert "its checksum is wrong" in caplog.text


def test_half_files_of_killed_writers_go_once_they_are_old(cache):
    cache.save_word_counts(WordCounts.of(COUNTS))
    abandoned, under_way = cache.folder / ".shard_x.bin.01.tmp", cache.folder / ".shard_x.bin.02.tmp"
    for path in (abandoned, under_way):
        path.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    assert cache.load_word_counts() is not None
    assert not abandoned.exists()
    assert under_way.exists()


def test_merges_and_vocab_are_readable(cache):
    cache.save_checkpoint(MERGES, VOCAB, "greatest_bytes")
    cache.save_pair_counts({(b"t", b"h"): 2, (b"\xe6", b"\x97"): 5})
    assert cache.load_merges("greatest_bytes") == MERGES
    assert cache.load_merges("smallest_ids") == []
    contents = {
        path.name.split("_")[0]: json.loads(path.read_text(encoding="utf-8")) for path in cache.folder.iterdir()
    }
    assert contents["merges"]["content"] == [["t", "h"], [{"hex": "e6"}, {"hex": "97"}], [" ", "th"]]
    assert contents["vocab"]["content"] == {"0": "<|endoftext|>", "1": "th", "2": {"hex": "e697"}}
    assert contents["pair"]["content"] == [[{"hex": "e6"}, {"hex": "97"}, 5], ["t", "h", 2]]
    assert cache.folder.name == "my_corpus"


def test_longer_merges_replace_shorter_ones_and_not_the_other_way_round(cache):
    cache.save_checkpoint(MERGES[:2], VOCAB, "greatest_bytes")
    cache.save_checkpoint(MERGES, VOCAB, "greatest_bytes")
    cache.save_checkpoint(MERGES[:1], VOCAB, "greatest_bytes")
    assert cache.load_merges("greatest_bytes") == MERGES
    assert len(list(cache.folder.glob("merges_*"))) == len(list(cache.folder.glob("vocab_*"))) == 1


def test_the_identity_is_the_content(tmp_path, corpus):
    copy = tmp_path / "copy"
    copy.write_bytes(corpus.read_bytes())
    identity = identify([corpus], ["a", "b"], GPT2_PATTERN)
    assert identify([copy], ["b", "a"], GPT2_PATTERN).digest == identity.digest
    assert identify([corpus], ["a"], GPT2_PATTERN).digest != identity.digest
    assert identify([corpus], ["a", "b"], CL100K_PATTERN).digest != identity.digest
    copy.write_bytes(corpus.read_bytes()[:-1] + b"!")
    assert identify([copy], ["a", "b"], GPT2_PATTERN).digest != identity.digest
    assert identity.shard(0, 0, 10) != identity.shard(0, 0, 11)


def test_the_identity_is_how_the_content_is_read_too(tmp_path):
    """A file that was trained on under a wrong name and then renamed is another corpus."""
    found = {}
    for name in ("a.txt", "b", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.gz", "a.zst", "a.parquet"):
        (tmp_path / name).write_bytes(b"the same")
        found[name] = identify([tmp_path / name], [], GPT2_PATTERN).digest
    assert found["a.txt"] == found["b"]
    assert found["a.jsonl"] == found["a.ndjson"]
    assert len(set(found.values())) == 6
    whole = shards.identities(shards.file_ranges([tmp_path / "a.jsonl"], GPT2_PATTERN, ()))
    assert [(one.size, one.digest) for one in whole] == [file_identity(tmp_path / "a.jsonl")]


def test_the_digest_of_plain_text_stays(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text")
    assert file_identity(tmp_path / "a.txt") == (4, "3dc510145fdf56679bb6349be5e3c53a")


def test_every_block_of_a_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("cs336_registry.text.training_cache._DIGEST_BLOCK", 10)
    path, seen = tmp_path / "a", set()
    for position in range(35):
        path.write_bytes(b"." * position + b"x" + b"." * (34 - position))
        seen.add(file_identity(path))
    assert len(seen) == 35


def test_several_files_are_named_by_their_folder(tmp_path):
    (tmp_path / "news").mkdir()
    assert dataset_name([tmp_path / "news" / "a.txt", tmp_path / "news" / "b.txt"]) == "news"
    assert dataset_name([tmp_path / "...txt"]) == "corpus"


@pytest.mark.parametrize("kind", ["merges", "word_counts"])
def test_no_flipped_bit_is_trusted(cache, kind, caplog):
    cache.save_word_counts(WordCounts.of(COUNTS))
    cache.save_checkpoint(MERGES, VOCAB, "greatest_bytes")
    (path,) = cache.folder.glob(f"{kind}_*")
    sound = path.read_bytes()
    caplog.set_level(logging.WARNING)
    for position in range(0, len(sound), 3):
        path.write_bytes(sound[:position] + bytes((sound[position] ^ 4,)) + sound[position + 1 :])
        if kind == "merges":
            assert cache.load_merges("greatest_bytes") in ([], MERGES)
        else:
            kept = cache.load_word_counts()
            assert kept is None or kept.to_dict() == COUNTS
    for length in (0, 10, len(sound) // 2, len(sound) - 1):
        path.write_bytes(sound[:length])
        assert not cache.load_merges("greatest_bytes") if kind == "merges" else cache.load_word_counts() is None
    assert f"{path} is not used: its checksum is wrong; it will be built again" in caplog.text


def test_a_foreign_or_old_file_is_named_and_not_used(cache, tmp_path, caplog):
    other = tmp_path / "other.txt"
    other.write_text("other")
    foreign = TrainingCache(tmp_path / "cache", [other], identify([other], [], GPT2_PATTERN))
    foreign.save_word_counts(WordCounts.of({b"foreign": 1}))
    cache.folder.mkdir(parents=True)
    (content,) = [path.read_bytes() for path in foreign.folder.iterdir()]
    own = cache.folder / f"word_counts_{cache.identity.digest}.bin"
    own.write_bytes(content)
    assert cache.load_word_counts() is None
    assert "it belongs to another corpus" in caplog.text
    own.write_bytes(content.replace(b'"version": 1', b'"version": 9'))
    assert cache.load_word_counts() is None
    assert "it has version 9, not 1" in caplog.text


def test_standard_input_is_not_cached(tmp_path, caplog):
    from cs336_registry.text.inputs import STANDARD_INPUT

    assert identify([STANDARD_INPUT], [], GPT2_PATTERN) is None
    assert "without the cache" in caplog.text
