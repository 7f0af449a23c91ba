"""Counts built apart and merged are the counts of the whole, and nothing is counted twice."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
from cs336_reference.pretoken_counter import pretoken_counter

from cs336_registry.text import counts_file, memory, samples, training_cache
from cs336_registry.text.counts_file import CountsFile, CountsIdentity, Shard, joined, overlap
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.shards import count_range, file_ranges
from cs336_registry.text.training_cache import WordCounts
from tests.corpora import SPECIAL_TOKENS, english

from .typing_commands import typed

SPECIAL = [word for token in SPECIAL_TOKENS for word in ("--special-token", token)]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return partial(typed, capsys)


@pytest.fixture
def corpus(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(english(60_000) + samples.tricky(2000), encoding="utf-8", newline="")
    second.write_bytes(samples.tricky_bytes(3000) + samples.prose(3000, documents=5).encode())
    return [first, second]


def test_no_shard_is_written_over(run, corpus, tmp_path):
    before = corpus[0].read_bytes()
    assert run("counts", "build", *corpus, "--out", corpus[0]).failed_with("first.txt is one of the inputs, and --out")
    assert run("counts", "build", *corpus, "--out", tmp_path).failed_with("which is a folder: name a file")
    assert corpus[0].read_bytes() == before


def build(run, *words):
    result = run("counts", "build", *words, *SPECIAL, "--backend", "heap_bpe", "--quiet")
    assert result.code == 0, result.err


def counts_in(path) -> dict[bytes, int]:
    return dict(CountsFile(path).records())


def test_shards_merged_are_the_whole(run, corpus, tmp_path):
    for path in corpus:
        build(run, path, "--out", path.with_suffix(".bin"))
    assert run("counts", "merge", "first.bin", "second.bin", "--out", "merged.bin").code == 0
    build(run, *corpus, "--out", "whole.bin")
    assert counts_in("merged.bin") == pretoken_counter(corpus, SPECIAL_TOKENS)
    assert (tmp_path / "merged.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()
    assert list(CountsFile("whole.bin").records(block=7)) == sorted(counts_in("whole.bin").items())
    assert CountsFile("whole.bin").words().to_dict() == counts_in("whole.bin")


@pytest.mark.parametrize("parts", [2, 5, 9])
def test_parts_of_a_file_merge_to_the_file(run, corpus, tmp_path, parts):
    names = [f"part_{number}.bin" for number in range(1, parts + 1)]
    for number, name in enumerate(names, start=1):
        build(run, *corpus, "--part", f"{number}/{parts}", "--out", name)
    assert run("counts", "merge", *reversed(names), "--out", "merged.bin").code == 0
    build(run, *corpus, "--out", "whole.bin")
    assert (tmp_path / "merged.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_parts_of_several_files_keep_to_max_ram_together(run, corpus, monkeypatch):
    words = ("counts", "build", *corpus, "--part", "1/2", *SPECIAL, "--backend", "heap_bpe", "--out")
    assert run(*words, "free.bin").code == 0
    # The backend has its own by now: the command's ceiling alone is made small.
    monkeypatch.setattr(memory, "bytes_of", lambda size: 100_000)
    told = run(*words, "bound.bin", "--max-ram", "2GB")
    assert told.code == 0 and "as a sorted run, to stay within max_ram" in told.err
    assert counts_in("bound.bin") == counts_in("free.bin")
    monkeypatch.setattr(memory, "bytes_of", lambda size: 10_000)
    assert run(*words, "x.bin", "--max-ram", "2GB").failed_with("max_ram is 1 MB, but a table of", "unique pretokens")


def test_a_packed_file_is_a_shard_of_one_part(run, corpus, tmp_path):
    packed = tmp_path / "first.txt.gz"
    packed.write_bytes(gzip.compress(corpus[0].read_bytes()))
    for number in (1, 2):
        build(run, packed, corpus[1], "--part", f"{number}/2", "--out", f"part_{number}.bin")
    assert run("counts", "merge", "part_1.bin", "part_2.bin", "--out", "merged.bin").code == 0
    assert counts_in("merged.bin") == pretoken_counter(corpus, SPECIAL_TOKENS)


def test_every_backend_counts_a_byte_range(corpus):
    import cs336_registry as registry

    ranges = file_ranges(corpus, GPT2_PATTERN, SPECIAL_TOKENS, 20_000)
    assert len(ranges) > 4
    for backend in ("heap_bpe", "reference"):
        counter, total = registry.get("pretoken_counter", backend=backend), Counter()
        for one in ranges:
            total.update(count_range(counter, one, SPECIAL_TOKENS, GPT2_PATTERN).to_dict())
        assert total == pretoken_counter(corpus, SPECIAL_TOKENS), backend


def test_a_counter_that_fails_on_a_range_leaves_no_thread_behind(corpus):
    import threading

    def broken(path, special_tokens, *, pattern):
        with open(path, "rb") as file:
            file.read(10)
        raise ValueError("no")

    (one, *_) = file_ranges(corpus[:1], GPT2_PATTERN, (), 20_000)
    before = threading.active_count()
    for counter in (broken, lambda path, special_tokens, pattern: {}):
        try:
            count_range(counter, one, (), GPT2_PATTERN)
        except ValueError as error:
            assert str(error) == "no"
    assert threading.active_count() == before


def test_the_same_content_is_never_counted_twice(run, corpus, tmp_path):
    copy = tmp_path / "another_name.txt"
    copy.write_bytes(corpus[0].read_bytes())
    result = run("counts", "build", *corpus, copy, "--out", "x.bin")
    assert result.failed_with("another_name.txt has the same content as", "first.txt", "--duplicates skip")
    build(run, *corpus, copy, "--duplicates", "skip", "--out", "whole.bin")
    assert counts_in("whole.bin") == pretoken_counter(corpus, SPECIAL_TOKENS)
    build(run, copy, "--out", "copy.bin")
    result = run("counts", "merge", "whole.bin", "copy.bin", "--out", "x.bin")
    assert result.failed_with("copy.bin counts again what another file has counted", "--duplicates skip")
    assert not (tmp_path / "x.bin").exists()
    assert run("counts", "merge", "copy.bin", "whole.bin", "--duplicates", "skip", "--out", "x.bin").code == 0
    assert (tmp_path / "x.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_overlapping_files_can_not_be_told_apart_and_are_refused(run, corpus):
    third = corpus[0].with_name("third.txt")
    third.write_text("and a third")
    build(run, *corpus, "--out", "a.bin")
    build(run, corpus[0], third, "--out", "b.bin")
    for duplicates in ("refuse", "skip"):
        assert run("counts", "merge", "a.bin", "b.bin", "--duplicates", duplicates, "--out", "x.bin").failed_with(
            "counts again what another file has counted", "leave it out"
        )


def test_counts_of_other_settings_are_refused(run, corpus):
    build(run, corpus[0], "--out", "a.bin")
    build(run, corpus[1], "--pattern", "cl100k", "--out", "b.bin")
    run("counts", "build", corpus[1], "--out", "c.bin", "--backend", "heap_bpe")
    assert run("counts", "merge", "a.bin", "b.bin", "--out", "x.bin").failed_with("b.bin was counted with pattern")
    assert run("counts", "merge", "a.bin", "c.bin", "--out", "x.bin").failed_with("c.bin was counted with special_tok")


def test_damage_is_found(run, corpus, tmp_path):
    build(run, corpus[0], "--out", "a.bin")
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.bin").write_bytes(content)
    (tmp_path / "short.bin").write_bytes(content[:-20])
    (tmp_path / "newer.bin").write_bytes(content.replace(b'"version": 1', b'"version": 9', 1))
    for name, message in (
        ("flipped.bin", "flipped.bin is damaged"),
        ("short.bin", "short.bin is damaged"),
        ("newer.bin", "version 9: expected"),
        ("first.txt", "first.txt is not a file of counts"),
        ("missing.bin", "no file missing.bin"),
    ):
        assert run("counts", "merge", "a.bin", name, "--out", "x.bin").failed_with(message), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--part", "0/3"), "--part is '0/3': give the part and the number of parts"),
        (("--part", "4/3"), "--part is '4/3'"),
        (("--part", "x"), "--part is 'x'"),
        (("--backend", "reference", "--max-ram", "1GB"), "backend reference has no --max-ram (1GB)"),
        (("--pattern", "gtp2"), "no pattern named 'gtp2'"),
    ],
    ids=["part_0", "part_4", "part_x", "option", "pattern"],
)
def test_bad_arguments_are_named(run, corpus, words, message):
    assert run("counts", "build", corpus[0], "--out", "x.bin", *words).failed_with(message)


def test_standard_input_is_no_shard(run):
    assert run("counts", "build", "-", "--out", "x.bin").failed_with("'-' can't be read twice", "save it to a file")


def test_the_format_is_the_training_caches(run, corpus, tmp_path):
    build(run, corpus[0], "--out", "a.bin")
    identity = json.loads((tmp_path / "a.bin").read_bytes().split(b"\n")[0])["identity"]
    kept = training_cache._load_counts(tmp_path / "a.bin", identity)
    assert kept is not None and kept.to_dict() == pretoken_counter(corpus[0], SPECIAL_TOKENS)
    training_cache._save_counts(tmp_path / "b.bin", identity, kept)
    assert (tmp_path / "b.bin").read_bytes() == (tmp_path / "a.bin").read_bytes()
    training_cache._save_counts(tmp_path / "c.bin", "0123456789abcdef", kept)
    with pytest.raises(ValueError, match="does not say which shards it counted"):
        CountsFile(tmp_path / "c.bin")


def test_counts_have_63_bits(tmp_path):
    def stored(name: str, digest: str, count: int) -> CountsFile:
        shard = Shard(5, digest, 0, 5)
        words = WordCounts(b"aabc", np.array([1, 2, 1], np.uint32), np.array([1, count, 2], np.int64))
        counts_file.write(tmp_path / name, CountsIdentity(GPT2_PATTERN, (), (shard,)), words)
        return CountsFile(tmp_path / name)

    half = 2**62
    a, b, c = stored("a", "1", half), stored("b", "2", half - 1), stored("c", "3", 1)
    counts_file.merge([a, b], tmp_path / "sum")
    assert counts_in(tmp_path / "sum") == {b"a": 2, b"ab": 2**63 - 1, b"c": 4}
    with pytest.raises(OverflowError, match=r"b'ab' was counted 9223372036854775808 times"):
        counts_file.merge([CountsFile(tmp_path / "sum"), c], tmp_path / "more")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "sum"]


def test_shards_join_and_overlap():
    def shard(start, end, digest="d"):
        return Shard(100, digest, start, end)

    assert joined([shard(50, 100), shard(0, 50), shard(7, 7)]) == (shard(0, 100),)
    assert joined([shard(0, 50), shard(60, 100)]) == (shard(0, 50), shard(60, 100))
    assert overlap([shard(0, 50), shard(50, 100), shard(0, 50, "e")]) is None
    assert overlap([shard(0, 51), shard(50, 100)]) == shard(50, 100)
    assert overlap([shard(0, 50), shard(0, 50)]) == shard(0, 50)


def test_a_full_disk_is_said_and_nothing_is_left(run, corpus, tmp_path, monkeypatch):
    import errno
    import os

    build(run, corpus[0], "--out", "a.bin")
    build(run, corpus[1], "--out", "b.bin")
    before = sorted(os.listdir(tmp_path))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        result = run("counts", "merge", "a.bin", "b.bin", "--out", "merged.bin", "--quiet")
    assert result.failed_with("the disk is full while merged.bin is made", "run the same command again")
    assert sorted(os.listdir(tmp_path)) == before
    assert run("counts", "merge", "a.bin", "b.bin", "--out", "merged.bin").code == 0
    assert counts_in("merged.bin") == pretoken_counter(corpus, SPECIAL_TOKENS)
