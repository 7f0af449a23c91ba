"""Killed at any moment and started again, with other workers or another vocab_size, training gives the same merges."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from cs336_heap_bpe import pretoken_counter as counter_module
from cs336_heap_bpe.bpe_trainer import bpe_trainer
from cs336_heap_bpe.pretoken_counter import pretoken_counter

from cs336_registry.text import training_cache
from cs336_registry.text.vocab_files import Merges
from tests.corpora import SPECIAL_TOKENS, english

VOCAB_SIZE = 1500
PROGRAM = """
    import sys
    from cs336_heap_bpe import pretoken_counter
    from cs336_heap_bpe.bpe_trainer import bpe_trainer
    pretoken_counter.ONE_PROCESS_BYTES, pretoken_counter.SMALLEST_SHARD = 0, 50_000
    corpus, cache, workers = sys.argv[1:]
    print("ready", flush=True)
    vocab, merges = bpe_trainer(
        corpus, {vocab_size}, {special_tokens!r}, num_workers=int(workers), cache_dir=cache or None, checkpoint_every=50
    )
    import hashlib
    print(hashlib.sha256(repr((vocab, merges)).encode()).hexdigest())
"""


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(english(400_000), encoding="utf-8", newline="")
    return path


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(counter_module, "ONE_PROCESS_BYTES", 0)
    monkeypatch.setattr(counter_module, "SMALLEST_SHARD", 50_000)


def program(corpus, cache, workers, **environment):
    source = textwrap.dedent(PROGRAM).format(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS)
    return subprocess.Popen(
        [sys.executable, "-c", source, str(corpus), str(cache), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def result_of(process) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.split()[-1]


def fingerprint(vocab, merges: Merges) -> str:
    return hashlib.sha256(repr((vocab, merges)).encode()).hexdigest()


def checkpoints(cache) -> list[str]:
    return sorted(path.name.split("_")[1] for path in cache.glob("*/merges_*.json"))


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is posix")
@pytest.mark.slow
def test_kill_and_resume(corpus, tmp_path):
    expected = fingerprint(*bpe_trainer(corpus, VOCAB_SIZE, SPECIAL_TOKENS, num_workers=1))
    with program(corpus, tmp_path / "timed", workers=2) as process:
        assert process.stdout.readline() == "ready\n"
        begun = time.monotonic()
        assert result_of(process) == expected
    whole = time.monotonic() - begun
    cache, source = tmp_path / "cache", random.Random(1)
    seen = set()
    for attempt in range(8):
        with program(corpus, cache, workers=1 + attempt % 3) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(source.uniform(0.05, 0.95) * whole)
            process.send_signal(signal.SIGKILL)
        seen |= {path.name.split("_")[0] for path in cache.glob("*/*")}
    assert seen & {"shard", "word"}, "no attempt had kept anything before it was killed"
    assert result_of(program(corpus, cache, workers=2)) == expected
    assert fingerprint(*bpe_trainer(corpus, VOCAB_SIZE, SPECIAL_TOKENS, num_workers=1, cache_dir=cache)) == expected
    assert not [path for path in cache.rglob("shard_*")], "shards stay behind"


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is posix")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    """In the middle of a call: an orphan would take the processor, and the memory, of the run that comes next."""
    source = f"""
        from cs336_heap_bpe.workers import run_in_processes
        list(run_in_processes("tests.heap_bpe.calls:endless", [({str(tmp_path)!r},)] * 2, 2))
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(source)], stderr=subprocess.PIPE) as parent:
        workers = wait_for(lambda: sorted(path.name for path in tmp_path.iterdir()), lambda names: len(names) == 2)
        assert all(map(is_running, workers))
        parent.send_signal(signal.SIGKILL)
        wait_for(lambda: [worker for worker in workers if is_running(worker)], lambda left: not left)
        assert parent.stderr.read() == b""


def is_running(process_id: str) -> bool:
    import psutil

    try:
        return psutil.Process(int(process_id)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(look, is_right, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not is_right(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("stop", [50, 149, 150, 700])
def test_stopped_between_merges(corpus, tmp_path, monkeypatch, stop):
    """The same at chosen places of the merge phase, by an error instead of a kill."""
    from cs336_heap_bpe.pair_merger import PairMerger

    expected = bpe_trainer(corpus, VOCAB_SIZE, SPECIAL_TOKENS, num_workers=1)
    arguments = {"num_workers": 1, "cache_dir": tmp_path / "cache", "checkpoint_every": 50}
    merge, made = PairMerger.merge, 0

    def merge_until(self, pair):
        nonlocal made
        made += 1
        if made > stop:
            raise KeyboardInterrupt
        return merge(self, pair)

    with monkeypatch.context() as patch:
        patch.setattr(PairMerger, "merge", merge_until)
        with pytest.raises(KeyboardInterrupt):
            bpe_trainer(corpus, VOCAB_SIZE, SPECIAL_TOKENS, **arguments)
    assert checkpoints(tmp_path / "cache") == [str(stop // 50 * 50)]
    assert bpe_trainer(corpus, VOCAB_SIZE, SPECIAL_TOKENS, **arguments) == expected


def test_other_vocab_sizes_use_the_same_merges(corpus, tmp_path, monkeypatch):
    from cs336_heap_bpe.pair_merger import PairMerger

    expected = {size: bpe_trainer(corpus, size, SPECIAL_TOKENS, num_workers=1) for size in (400, 800, 1200)}
    merged = []
    merge = PairMerger.merge
    monkeypatch.setattr(PairMerger, "merge", lambda self, pair: merged.append(self.wanted is None) or merge(self, pair))
    for size, new_merges in ((800, 800 - 258), (400, 0), (1200, 400), (800, 0)):
        merged.clear()
        found = bpe_trainer(corpus, size, SPECIAL_TOKENS, num_workers=1, cache_dir=tmp_path / "cache")
        assert found == expected[size]
        assert sum(merged) == new_merges
    reordered = bpe_trainer(corpus, 400, SPECIAL_TOKENS[::-1], num_workers=1, cache_dir=tmp_path / "cache")
    assert reordered[1] == expected[400][1]
    assert reordered[0][0] == SPECIAL_TOKENS[1].encode()


@pytest.mark.parametrize("kind", ["word_counts", "merges"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "foreign"])
def test_a_damaged_cache_is_named_and_rebuilt(corpus, tmp_path, caplog, kind, damage):
    cache = tmp_path / "cache"
    expected = bpe_trainer(corpus, 600, SPECIAL_TOKENS, num_workers=1, cache_dir=cache)
    (path,) = cache.glob(f"*/{kind}_*")
    sound = path.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("something else altogether " * 30)
    bpe_trainer(other, 300, SPECIAL_TOKENS, num_workers=1, cache_dir=cache)
    (foreign,) = (cache / "other").glob(f"{kind}_*")
    middle = len(sound) // 2
    damaged = {
        "flipped": sound[:middle] + bytes((sound[middle] ^ 1,)) + sound[middle + 1 :],
        "cut": sound[:middle],
        "emptied": b"",
        "foreign": foreign.read_bytes(),
    }
    path.write_bytes(damaged[damage])
    caplog.set_level(logging.WARNING)
    assert bpe_trainer(corpus, 650, SPECIAL_TOKENS, num_workers=1, cache_dir=cache)[1][: 600 - 258] == expected[1]
    assert f"{path} is not used" in caplog.text
    assert bpe_trainer(corpus, 600, SPECIAL_TOKENS, num_workers=1, cache_dir=cache) == expected


def test_merges_of_other_words_are_found_out(corpus, tmp_path, caplog):
    """A sound file with merges that these words can't have: a checksum proves no origin."""
    from cs336_registry.text.patterns import GPT2_PATTERN

    cache = counter_module.open_cache(tmp_path / "cache", [corpus], SPECIAL_TOKENS, GPT2_PATTERN)
    cache.save_checkpoint([(b"\x00", b"\x01")] * 700, {}, "greatest_bytes")
    expected = bpe_trainer(corpus, 400, SPECIAL_TOKENS, num_workers=1)
    found = bpe_trainer(corpus, 400, SPECIAL_TOKENS, num_workers=1, cache_dir=tmp_path / "cache")
    assert found == expected
    assert "merges_700_" in caplog.text
    assert "does not occur; it will be built again" in caplog.text


@pytest.mark.parametrize(
    "change", [lambda content: content[:-1000], lambda content: content[:-1] + b"!"], ids=["shorter", "as_long"]
)
def test_a_file_that_changes_while_it_is_counted_is_refused_and_nothing_is_kept(corpus, tmp_path, monkeypatch, change):
    content, cache = corpus.read_bytes(), tmp_path / "cache"
    expected = pretoken_counter(corpus, SPECIAL_TOKENS)

    def identify_and_change(*arguments):
        identity = training_cache.identify(*arguments)
        corpus.write_bytes(change(content))
        return identity

    with monkeypatch.context() as patch:
        patch.setattr(counter_module, "identify", identify_and_change)
        with pytest.raises(ValueError, match=r"corpus.txt changed while it was read: run this again"):
            pretoken_counter(corpus, SPECIAL_TOKENS, num_workers=1, cache_dir=cache)
    assert not list(cache.rglob("*.bin"))
    corpus.write_bytes(content)
    assert pretoken_counter(corpus, SPECIAL_TOKENS, num_workers=1, cache_dir=cache) == expected


def test_hash_seeds_workers_and_shards_do_not_matter(corpus):
    runs = [program(corpus, "", workers=1 + seed % 2, PYTHONHASHSEED=str(seed)) for seed in range(3)]
    expected = fingerprint(*bpe_trainer(corpus, VOCAB_SIZE, SPECIAL_TOKENS, num_workers=1))
    assert {result_of(run) for run in runs} == {expected}


def test_caches_of_different_runs_are_the_same_files(corpus, tmp_path):
    contents = []
    for workers in (1, 3):
        bpe_trainer(corpus, 500, SPECIAL_TOKENS, num_workers=workers, cache_dir=tmp_path / str(workers))
        files = sorted((tmp_path / str(workers)).rglob("*.*"))
        contents.append([(path.name, path.read_bytes()) for path in files])
    assert contents[0] == contents[1]


def test_a_full_disk_is_a_clear_error_and_training_resumes(corpus, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    expected = bpe_trainer(corpus, 600, SPECIAL_TOKENS, num_workers=1)
    fsync, left = os.fsync, 6

    def fsync_until_full(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync_until_full)
        with pytest.raises(OSError, match="No space left on device"):
            bpe_trainer(corpus, 600, SPECIAL_TOKENS, num_workers=1, cache_dir=cache, checkpoint_every=50)
    assert not list(cache.rglob("*.tmp"))
    assert bpe_trainer(corpus, 600, SPECIAL_TOKENS, num_workers=1, cache_dir=cache) == expected


def test_bad_checkpoint_every(corpus):
    with pytest.raises(ValueError, match="checkpoint_every is 0: it must be at least 1 merge"):
        bpe_trainer(corpus, 600, checkpoint_every=0)
