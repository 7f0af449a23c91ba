"""Counts are the same for every cut, every number of workers and every memory budget."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from itertools import count

import pytest
from cs336_heap_bpe import bpe_trainer, memory_plan, pair_merger, pretoken_counter, workers
from cs336_heap_bpe.counting import count_range, count_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_registry.components.pretoken_counter import OVERLAPPING, SPECIAL_TOKENS, oracle
from cs336_registry.text import accumulator, byte_ranges, samples
from cs336_registry.text.accumulator import Accumulator
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN
from cs336_registry.text.training_cache import WordCounts
from tests.corpora import english

from .calls import Unreadable
from .test_resume import wait_for

PATTERNS = (GPT2_PATTERN, CL100K_PATTERN, r"\S+|\s+(?=\S)|\s")


@pytest.mark.parametrize("window", [1, 64, 1 << 16])
@pytest.mark.parametrize(
    "special_tokens", [(), SPECIAL_TOKENS, OVERLAPPING, ("a b", " ", "\n"), ("<|", "|>", "pad|><")]
)
def test_ranges_count_as_the_whole(tmp_path, monkeypatch, special_tokens, window):
    monkeypatch.setattr(byte_ranges, "WINDOW", window)
    path = tmp_path / "corpus"
    for seed in range(12):
        path.write_bytes(samples.tricky_bytes(100, seed=seed) + samples.tricky(60, seed=seed).encode())
        for pattern in PATTERNS:
            ranges = byte_ranges.byte_ranges(path, pattern, special_tokens, 1 + 40 * (seed % 3))
            counts = Counter()
            for start, end in ranges:
                counts.update(count_range(path, start, end, pattern, special_tokens).to_dict())
            assert (ranges[0][0], ranges[-1][1]) == (0, path.stat().st_size)
            assert [end for _, end in ranges[:-1]] == [start for start, _ in ranges[1:]]
            assert dict(counts) == oracle(path, special_tokens, pattern=pattern)


def test_files_are_cut_where_they_can_be(tmp_path):
    path = tmp_path / "corpus"
    path.write_text("word " * 10_000)
    assert len(byte_ranges.byte_ranges(path, GPT2_PATTERN, (), 1000)) == 50
    path.write_text("日本語" * 10_000, encoding="utf-8")
    assert len(byte_ranges.byte_ranges(path, GPT2_PATTERN, (), 1000)) == 1
    path.write_text(("日本語" * 100 + "<|endoftext|>") * 100, encoding="utf-8")
    assert len(byte_ranges.byte_ranges(path, PATTERNS[2], SPECIAL_TOKENS, 1000)) == 50


@settings(max_examples=200)
@given(st.lists(st.sampled_from(samples.TRICKY), max_size=40).map("".join), st.sampled_from(PATTERNS))
def test_pieces_give_the_pattern_s_pretokens(text, pattern):
    import regex

    expected = Counter(match[0] for match in regex.finditer(pattern, text) if match[0])
    assert total(count_texts([[text]], pattern, ())) == {word.encode(): count for word, count in expected.items()}


def total(parts) -> Counter[bytes]:
    return sum((Counter(part.to_dict()) for part in parts), Counter())


def test_words_are_turned_into_pretokens_and_given_away_before_they_are_too_many(tmp_path):
    texts = [[f"{number} words and {number % 7} more."] for number in range(300)]
    for pattern in PATTERNS:
        (expected,) = count_texts(texts, pattern, ())
        parts = list(count_texts(texts, pattern, (), most_words=50))
        assert len(parts) > 5
        assert max(len(part.counts) for part in parts) < 60
        assert total(parts) == expected.to_dict()
    path = tmp_path / "corpus"
    path.write_bytes(samples.prose(60_000).encode())
    (expected,) = count_texts([[path.read_bytes().decode()]], GPT2_PATTERN, ())
    found = count_range(path, 0, path.stat().st_size, GPT2_PATTERN, (), most_words=500)
    assert list(found.items()) == list(expected.items())


def test_a_range_that_ends_early_is_not_counted(tmp_path):
    (tmp_path / "a").write_text("a text that was longer")
    with pytest.raises(ValueError, match=r"a changed while it was read"):
        count_range(tmp_path / "a", 2, 30, GPT2_PATTERN, ())


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_workers_agree(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(pretoken_counter, "ONE_PROCESS_BYTES", 0)
    monkeypatch.setattr(pretoken_counter, "SMALLEST_SHARD", 20_000)
    path = tmp_path / "corpus.txt"
    path.write_text(english(), encoding="utf-8", newline="")
    counts = pretoken_counter.pretoken_counter([path, path], SPECIAL_TOKENS, num_workers=num_workers)
    assert counts == {pretoken: 2 * count for pretoken, count in oracle(path, SPECIAL_TOKENS).items()}


def test_small_inputs_start_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_start", lambda: pytest.fail("a process was started"))
    (tmp_path / "a").write_text("small")
    assert pretoken_counter.pretoken_counter(tmp_path / "a", num_workers=8) == {b"small": 1}


def test_bad_arguments(tmp_path):
    (tmp_path / "a").write_text("small")
    with pytest.raises(ValueError, match="num_workers is 0: it must be at least 1"):
        pretoken_counter.pretoken_counter(tmp_path / "a", num_workers=0)
    with pytest.raises(ValueError, match="max_ram is 'much': give bytes"):
        pretoken_counter.pretoken_counter(tmp_path / "a", max_ram="much")


@pytest.fixture
def no_base(monkeypatch):
    """Processes that weigh nothing and tables that may be tiny: what is left of a ceiling is for words alone."""
    monkeypatch.setattr(pair_merger, "BASE_BYTES", 0)
    for name in ("BASE_BYTES", "WORKER_BYTES", "LOWEST_BYTES", "FEWEST_WORDS"):
        monkeypatch.setattr(memory_plan, name, 0)
    monkeypatch.setattr(memory_plan, "FEWEST_WORDS", 1000)


def test_merging_that_passes_max_ram_is_refused_with_the_least_that_is_enough(tmp_path, no_base):
    (tmp_path / "a").write_text(samples.prose(400, seed=3))
    with pytest.raises(MemoryError, match=r"max_ram is 1 MB, but merging \([0-9,]+ unique pretokens\) takes about"):
        bpe_trainer.bpe_trainer(tmp_path / "a", 300, max_ram=10_000, cache_dir=tmp_path / "cache")
    expected = bpe_trainer.bpe_trainer(tmp_path / "a", 300)
    assert bpe_trainer.bpe_trainer(tmp_path / "a", 300, max_ram="2MB", cache_dir=tmp_path / "cache") == expected


def test_a_ceiling_below_the_least_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("text")
    monkeypatch.setattr(pretoken_counter, "count_texts", None)
    monkeypatch.setattr(pretoken_counter, "run_in_processes", None)
    with pytest.raises(MemoryError, match=r"max_ram is 20 MB, but counting takes about \d+ MB: pass max_ram='\d+MB'"):
        pretoken_counter.pretoken_counter(tmp_path / "a", max_ram="20MB")


def test_a_sample_refuses_what_surely_does_not_fit(tmp_path, monkeypatch, capsys, no_base):
    monkeypatch.setattr(memory_plan, "SAMPLE_RANGE_BYTES", 2000)
    monkeypatch.setattr(memory_plan, "SAMPLED_FROM_BYTES", 100_000)
    path = tmp_path / "corpus"
    path.write_text(" ".join(f"{number:x}" for number in range(70_000)))
    number, num_bytes = memory_plan.projected([path], (), GPT2_PATTERN)
    counted = oracle(path, ())
    assert 0.7 < number / len(counted) < 1.4
    assert 0.7 < num_bytes / sum(map(len, counted)) < 1.4
    with monkeypatch.context() as patch:
        patch.setattr(pretoken_counter, "run_in_processes", None)
        with pytest.raises(MemoryError, match=r"merging \(about [0-9,]+ unique pretokens, from a sample\) takes about"):
            bpe_trainer.bpe_trainer(path, 300, max_ram="1MB", progress=True)
    assert "unique pretokens, from a sample: merging takes about" in capsys.readouterr().err
    assert memory_plan.projected([path, tmp_path / "-"], (), GPT2_PATTERN) is None


def test_a_ceiling_bounds_workers_words_and_sums(tmp_path, monkeypatch, capsys, no_base):
    """Tiny tables: words are given away and sums go to disk many times, and it is said; the counts are the same."""
    monkeypatch.setattr(pretoken_counter, "ONE_PROCESS_BYTES", 0)
    monkeypatch.setattr(pretoken_counter, "SMALLEST_SHARD", 20_000)
    monkeypatch.setattr(memory_plan, "BYTES_PER_ENTRY", 1)
    monkeypatch.setattr(accumulator, "BYTES_PER_ENTRY", 3000)
    path = tmp_path / "corpus.txt"
    path.write_text(english() + samples.tricky(500), encoding="utf-8", newline="")
    ceiling = memory_plan.Ceiling(3_000_000)
    assert ceiling.plan(8).num_workers == 4
    assert memory_plan.Ceiling().plan(8).num_workers == 8
    counts = pretoken_counter.pretoken_counter(path, SPECIAL_TOKENS, num_workers=2, max_ram="3MB", progress=True)
    assert counts == oracle(path, SPECIAL_TOKENS)
    said = capsys.readouterr().err
    assert "max_ram = 3 MB: 2 processes of at most" in said
    assert "as a sorted run, to stay within max_ram" in said
    assert re.search(r"merging \d+ sorted runs", said)


def test_tables_that_outgrow_the_budget_go_to_disk(monkeypatch):
    monkeypatch.setattr(accumulator, "BYTES_PER_ENTRY", 1)
    parts = [Counter(samples.tricky(400, seed=seed).encode().split(b" ")) for seed in range(40)]
    messages = []
    with Accumulator(100, messages.append) as bounded, Accumulator() as unbounded:
        bounded.most_entries = 100
        for part in parts:
            bounded.add(WordCounts.of(part))
            unbounded.add(WordCounts.of(part))
        assert len(bounded.runs) > 5
        folder = bounded.runs[0].parent
        spilled, held = bounded.total(), unbounded.total()
    assert spilled.to_dict() == held.to_dict() == dict(sum(parts, Counter()))
    assert spilled.text == held.text
    assert not folder.exists()
    assert "as a sorted run, to stay within max_ram" in messages[0]


def test_workers_answer_fail_and_die(capfd):
    here = "tests.heap_bpe.calls"
    assert dict(workers.run_in_processes(f"{here}:doubled", [(n,) for n in range(9)], 3)) == {
        n: 2 * n for n in range(9)
    }
    with pytest.raises(ValueError, match="no luck"):
        list(workers.run_in_processes(f"{here}:failing", [("luck",), ("luck",)], 2))
    with pytest.raises(ChildProcessError, match="a worker process ended with exit code 3"):
        list(workers.run_in_processes(f"{here}:dying", [(1,), (2,)], 2))
    assert "not into the answers" in capfd.readouterr().err


def test_a_job_that_no_worker_can_read_is_an_error():
    with pytest.raises(ValueError, match="no receiver"):
        list(workers.run_in_processes("tests.heap_bpe.calls:doubled", [(Unreadable(),)] * 4, 2))


def test_a_worker_that_starts_while_the_others_are_killed_is_killed_too(monkeypatch):
    start, turns, started = workers._start, count(), []

    def start_one_when_the_other_is_killed():
        if next(turns) == 1:
            wait_for(lambda: started, lambda found: found and found[0].poll() is not None)
        started.append(start())
        return started[-1]

    def run():
        with pytest.raises(ValueError, match="no luck"):
            list(workers.run_in_processes("tests.heap_bpe.calls:failing", [("luck",)] * 2, 2))

    monkeypatch.setattr(workers, "_start", start_one_when_the_other_is_killed)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(120)
    for worker in started:
        worker.kill()
    assert not thread.is_alive(), "a worker was waited for that nothing ended"


def test_results_that_nobody_takes_do_not_pile_up():
    drawn = []

    class Jobs(list):
        def __iter__(self):
            for job in super().__iter__():
                drawn.append(job)
                yield job

    results = workers.run_in_processes("tests.heap_bpe.calls:doubled", Jobs((n,) for n in range(20)), 2)
    for taken, (position, result) in enumerate(results):
        assert result == 2 * position
        assert len(drawn) <= taken + 4


def test_a_script_without_a_guard_may_train(tmp_path):
    (tmp_path / "corpus.txt").write_text(english(), encoding="utf-8", newline="")
    script = """
        from cs336_heap_bpe import pretoken_counter
        from cs336_heap_bpe.bpe_trainer import bpe_trainer
        pretoken_counter.ONE_PROCESS_BYTES, pretoken_counter.SMALLEST_SHARD = 0, 20_000
        print(len(bpe_trainer("corpus.txt", 300, num_workers=2)[1]))
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout == "44\n", result.stderr
