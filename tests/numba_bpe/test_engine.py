"""The compiled engine at its edges: every way in, long pretokens, wide numbers, ceilings, caches, other processes."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import pytest
from cs336_numba_bpe import (
    byte_ranges,
    compile_cache,
    corpus,
    memory_estimate,
    merge_engine,
    spill,
    text_buffer,
    tokenizer,
    word_counter,
)
from cs336_numba_bpe.bpe_trainer import bpe_trainer
from cs336_numba_bpe.compile_cache import load_kernels, private_folder
from cs336_numba_bpe.constants import CL100K, GPT2
from cs336_numba_bpe.count_table import WordCounts
from cs336_numba_bpe.merge_engine import MergeEngine
from cs336_numba_bpe.merge_state import FLOOR, NUM_ROWS
from cs336_numba_bpe.native_image import flatten
from cs336_numba_bpe.pretoken_counter import pretoken_counter
from cs336_numba_bpe.small import joined, train_merges
from cs336_numba_bpe.tokenizer import Tokenizer

from cs336_registry.components import bpe_trainer as trainer_contract
from cs336_registry.components import pretoken_counter as counter_contract
from cs336_registry.text import frequent_words, samples
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN
from cs336_registry.text.training_cache import TrainingCache, identify
from cs336_registry.text.training_cache import WordCounts as KeptCounts
from tests.fuzzing import PATTERNS, SPECIAL_TOKEN_LISTS, expected_counts, naive_merges

from .fuzzing import counted, engine_merges

SPECIAL = ["<|endoftext|>", "<|pad|>"]


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_bytes((samples.prose(6000, seed=1, documents=20) + samples.tricky(4000, seed=2)).encode())
    return path


@pytest.mark.parametrize(
    "text",
    ["a" * 100_000, " " * 50_000 + "b", "\n" * 70_000 + " x", "'s" * 30_000, "é" * 50_000, "日" * 40_000, "1" * 9_999],
    ids=["letters", "spaces", "newlines", "contractions", "two_bytes", "three_bytes", "digits"],
)
@pytest.mark.parametrize("pattern", PATTERNS, ids=["gpt2", "cl100k"])
def test_pretokens_longer_than_a_block(text: str, pattern: str) -> None:
    assert counted(text.encode(), (), pattern, 4096) == expected_counts(text.encode(), (), pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["gpt2", "cl100k"])
def test_where_two_blocks_of_64_bytes_meet(pattern: str) -> None:
    """Every four characters of these kinds, with the border before each third of their bytes."""
    filler = b"x" * 64
    words = ["".join(characters).encode() for characters in product("a1!'s \t\n\u3000\u2014", repeat=4)]
    for first in range(0, len(words), 64):  # their ends fit into one scan
        text = b"".join(
            filler[: 64 - border] + word + filler[: 64 - len(word) + border]
            for number, word in enumerate(words[first : first + 64])
            for border in range(number % 3, len(word), 3)
        )
        assert counted(text, (), pattern, 1 << 20) == expected_counts(text, (), pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=["gpt2", "cl100k"])
@pytest.mark.parametrize(
    "special_tokens", SPECIAL_TOKEN_LISTS, ids=lambda tokens: f"{len(tokens)}_{'_'.join(tokens)!a}"
)
def test_ranges_add_up(
    tmp_path: Path, pattern: str, special_tokens: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    """Ranges of a few bytes, on five threads, count what the whole text counts."""
    monkeypatch.setattr(word_counter, "MIN_RANGE_BYTES", 1)
    monkeypatch.setattr(word_counter, "RANGE_BYTES", 37)
    path = tmp_path / "text.txt"
    path.write_bytes(samples.tricky_bytes(1500, seed=3) + samples.prose(200, seed=3).encode())
    found = pretoken_counter(path, special_tokens, pattern=pattern, num_threads=5)
    assert found == expected_counts(path.read_bytes(), special_tokens, pattern)
    kind = GPT2 if pattern == GPT2_PATTERN else CL100K
    encoded = [token.encode() for token in special_tokens]
    ranges = byte_ranges.cut_into_ranges([path], kind, encoded, 37)
    assert (len(ranges) > 20) != ("\ufffd" in "".join(special_tokens)), "hardly cut, or cut at U+FFFD"


@pytest.mark.parametrize("kind", ["gz", "jsonl", "list"])
def test_other_kinds_of_files(tmp_path: Path, kind: str, prose: Path, compiled: None) -> None:
    text = prose.read_bytes()
    expected = counter_contract.oracle(prose, SPECIAL)
    if kind == "gz":
        source: Path | list[Path] = tmp_path / "text.gz"
        source.write_bytes(gzip.compress(text))
    elif kind == "jsonl":
        source = tmp_path / "text.jsonl"
        source.write_text(json.dumps({"text": text.decode()}) + "\n")
    else:
        source = [prose, prose]
        expected = {pretoken: 2 * count for pretoken, count in expected.items()}
    assert pretoken_counter(source, SPECIAL) == expected


@pytest.mark.parametrize("tie_break", ["greatest_bytes", "smallest_ids"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=["gpt2", "cl100k"])
def test_compiled_and_plain_training_agree(
    prose: Path, pattern: str, tie_break: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"pattern": pattern, "tie_break": tie_break}
    plain = bpe_trainer(prose, 900, SPECIAL, **options)
    monkeypatch.setattr(corpus, "WARM_BYTES", 0)
    monkeypatch.setattr(corpus, "COLD_BYTES", 0)
    assert bpe_trainer(prose, 900, SPECIAL, **options) == plain
    assert bpe_trainer(prose, 900, SPECIAL, num_threads=3, **options) == plain


def test_training_matches_the_oracle(tmp_path: Path, compiled: None) -> None:
    path = tmp_path / "text.txt"
    path.write_text(samples.prose(700, seed=5, documents=4) + samples.tricky(500, seed=5), newline="")
    assert bpe_trainer(path, 420, SPECIAL) == trainer_contract.oracle(path, 420, SPECIAL)


@pytest.mark.parametrize("count", [2**31 - 1, 2**32 + 7, 2**60])
def test_counts_take_64_bits(count: int) -> None:
    words = {b"abab": count, b"xy": count + 1, b"ab": 1}
    engine = MergeEngine(WordCounts.from_dict(words), 300)
    engine.run(44)
    assert engine_merges(engine) == naive_merges(words, 44, "greatest_bytes")
    assert engine_merges(engine)[0] == (b"a", b"b", 2 * count + 1)


def test_counts_beyond_63_bits_are_refused() -> None:
    words = WordCounts.from_dict({b"abcdefgh": 2**60, b"ab": 2**60})
    with pytest.raises(OverflowError, match="use fewer shards"):
        MergeEngine(words, 300)
    with pytest.raises(ValueError, match="must not be negative"):
        MergeEngine(WordCounts.from_dict({b"ab": -1}), 300)


def test_wide_places_give_the_same_merges() -> None:
    words = expected_counts(samples.prose(3000, seed=7).encode(), (), GPT2_PATTERN)
    engines = [MergeEngine(WordCounts.from_dict(words), 800, wide=wide) for wide in (False, True)]
    for engine in engines:
        engine.run(544)
    assert (engines[1].arena.format, engines[1].symbols.format) == ("q", "i")
    assert MergeEngine(WordCounts.from_dict({b"ab" * 40_000: 1}), 70_000).wide, "ids beyond 16 bits need wide symbols"
    assert engine_merges(engines[0]) == engine_merges(engines[1])
    assert [merge[:2] for merge in engine_merges(engines[0])] == train_merges(words, 544, "greatest_bytes")


def test_rare_pairs_are_dropped_without_changing_a_merge() -> None:
    """Where there are more words than merges, pairs that are too rare get no row, though `all_pairs` keeps them."""
    words, num_merges = expected_counts(samples.prose(5000, seed=9).encode(), (), GPT2_PATTERN), 100
    dropping, keeping = (
        MergeEngine(WordCounts.from_dict(words), 256 + num_merges, all_pairs=all_pairs) for all_pairs in (False, True)
    )
    for engine in (dropping, keeping):
        engine.run(num_merges)
    assert engine_merges(dropping) == engine_merges(keeping) == naive_merges(words, num_merges, "greatest_bytes")
    assert 1 < dropping.state[FLOOR] <= dropping.merge_count[num_merges - 1]
    assert dropping.state[NUM_ROWS] < keeping.state[NUM_ROWS]
    tokens, pairs = keeping.tokens(), Counter()
    for word, count in words.items():
        ids = list(word)
        for result, (left, right, _) in enumerate(keeping.merge_rows(), 256):
            ids = joined(ids, (left, right), result)
        for left, right in pairwise(ids):
            pairs[tokens[left], tokens[right]] += count
    assert {pair: keeping.pair_count(*pair) for pair in pairs} == pairs


def test_spilled_counts_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ceiling of a few kilobytes over the base sends many runs to disk and back, and says so."""
    source = random.Random(9)
    path = tmp_path / "text.txt"
    words = ["".join(source.choices("abcdefghij", k=source.randrange(1, 40))) for _ in range(30_000)]
    path.write_text(" ".join(words))
    expected = counter_contract.oracle(path)
    monkeypatch.setattr(text_buffer, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(word_counter, "FIRST_BITS", 8)
    monkeypatch.setattr(memory_estimate, "BASE_BYTES", 1 << 20)
    monkeypatch.setattr(memory_estimate, "BYTES_PER_THREAD", 0)
    monkeypatch.setattr(spill.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(memory_estimate, "dictionary_bytes", lambda words: 0)
    found = pretoken_counter(path, max_ram=(2 << 20) + 1000, progress=True)
    assert found == expected
    said = capsys.readouterr().err
    assert "sorted runs go to" in said and "merging" in said
    assert not list(tmp_path.glob("cs336_counts_*")), "the runs were left on disk"


def test_a_ceiling_that_cant_be_kept_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before counting where a sample shows it, else before merging; the budget that it names is enough."""
    source = random.Random(3)
    path = tmp_path / "text.txt"
    path.write_text(" ".join("".join(source.choices("abcdefghij", k=6)) for _ in range(60_000)))
    with pytest.raises(MemoryError, match="max_ram is 10 MB, but counting takes about"):
        bpe_trainer(path, 300, max_ram="10MB", num_threads=2)
    monkeypatch.setattr(memory_estimate, "BASE_BYTES", 1 << 20)
    monkeypatch.setattr(memory_estimate, "BYTES_PER_THREAD", 0)
    for name, size in (("SAMPLE_RANGE_BYTES", 4096), ("SAMPLED_FROM_BYTES", 100_000)):
        monkeypatch.setattr(memory_estimate, name, size)
    needed = r"merging .about [0-9,]+ unique pretokens, from a sample. takes about ([0-9]+) MB"
    with pytest.raises(MemoryError, match=needed) as ahead:
        bpe_trainer(path, 300, max_ram="5MB", progress=True)
    assert "counting" not in capsys.readouterr().err
    monkeypatch.setattr(memory_estimate, "SAMPLED_FROM_BYTES", 1 << 40)
    with pytest.raises(MemoryError, match=r"pass max_ram='([0-9]+)MB'") as counted_error:
        bpe_trainer(path, 300, max_ram="5MB", cache_dir=tmp_path / "cache")
    budgets = [int(re.search("max_ram='([0-9]+)MB'", str(error.value))[1]) for error in (ahead, counted_error)]
    assert budgets[1] / 1.5 < budgets[0] < 1.5 * budgets[1], "the sample's estimate is far from the counted one"
    expected = bpe_trainer(path, 300)
    assert bpe_trainer(path, 300, max_ram=f"{budgets[1]}MB", cache_dir=tmp_path / "cache") == expected


def test_options_are_checked(prose: Path) -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        pretoken_counter(prose, num_threads=0)
    with pytest.raises(ValueError, match="max_ram is 'much'"):
        pretoken_counter(prose, max_ram="much")
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        bpe_trainer(prose, 300, checkpoint_every=0)


@pytest.mark.parametrize("forced", ["compiled", "plain_python"])
def test_training_goes_on_from_its_cache(
    prose: Path, tmp_path: Path, forced: str, request: pytest.FixtureRequest
) -> None:
    """Shorter and longer vocabularies, another thread count and a damaged checkpoint all give what no cache gives."""
    request.getfixturevalue(forced)
    expected = bpe_trainer(prose, 700, SPECIAL)
    cache = tmp_path / "cache"
    for vocab_size, threads in ((400, 1), (700, 2), (500, 2), (700, 1)):
        vocab, merges = bpe_trainer(
            prose, vocab_size, SPECIAL, cache_dir=cache, num_threads=threads, checkpoint_every=7
        )
        assert merges == expected[1][: vocab_size - 258]
        assert vocab == {token_id: expected[0][token_id] for token_id in range(vocab_size)}
    kept = TrainingCache(cache, [prose], identify([prose], SPECIAL, GPT2_PATTERN))
    assert kept.load_merges("greatest_bytes") == expected[1]
    (merges_file,) = kept.folder.glob("merges_*")
    merges_file.write_bytes(merges_file.read_bytes()[:-40])
    assert bpe_trainer(prose, 700, SPECIAL, cache_dir=cache) == expected


def test_shards_are_kept_and_reused(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    """A run that ends in the middle of counting leaves shards, which the next run takes instead of counting again."""
    monkeypatch.setattr(corpus, "SHARD_BYTES", 4000)
    monkeypatch.setattr(word_counter, "MIN_RANGE_BYTES", 1000)
    monkeypatch.setattr(word_counter, "RANGE_BYTES", 1000)
    monkeypatch.setattr(word_counter, "KEPT_FROM_BYTES", 0)
    expected = counter_contract.oracle(prose, SPECIAL)
    count_sources = word_counter.WordCounter._count_sources
    calls = 0

    def failing(self, sources, advance):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return count_sources(self, sources, advance)

    monkeypatch.setattr(word_counter.WordCounter, "_count_sources", failing)
    with pytest.raises(KeyboardInterrupt):
        pretoken_counter(prose, SPECIAL, cache_dir=tmp_path / "cache")
    shards = list((tmp_path / "cache").rglob("shard_*"))
    assert len(shards) == 3
    calls = 4
    assert pretoken_counter(prose, SPECIAL, cache_dir=tmp_path / "cache", num_threads=2) == expected
    before = calls
    assert pretoken_counter(prose, SPECIAL, cache_dir=tmp_path / "cache") == expected
    assert calls == before, "the whole count was kept but counted again"
    assert not list((tmp_path / "cache").rglob("shard_*"))


def test_small_files_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    """Their counts are not kept one by one: with thousands of files that would take longer than counting them."""
    paths = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "a.txt"]
    for path in paths:
        path.write_text(f"the same and {path.name} <|pad|>")
    monkeypatch.setattr(TrainingCache, "save_shard", None)
    found = pretoken_counter(paths, SPECIAL, cache_dir=tmp_path / "cache")
    assert found == counter_contract.oracle(paths, SPECIAL)


def test_a_file_that_changes_while_it_is_read_is_refused(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    count = word_counter.WordCounter.count

    def changed_meanwhile(self, paths, advance):
        counts = count(self, paths, advance)
        paths[0].write_bytes(paths[0].read_bytes() + b"more")
        return counts

    with monkeypatch.context() as patch:
        patch.setattr(word_counter.WordCounter, "count", changed_meanwhile)
        with pytest.raises(ValueError, match=r"prose.txt changed while it was read: run this again"):
            pretoken_counter(prose, SPECIAL, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("word_counts*"))
    buffer = text_buffer.TextBuffer(lambda text, start, stop, is_last: (stop, False))
    with pytest.raises(ValueError, match=r"prose.txt changed while it was read: run this again"):
        list(buffer.read_range(prose, 0, prose.stat().st_size + 1))


def test_text_without_a_cut_is_not_looked_through_at_every_block() -> None:
    looked_through = 0

    def nothing_is_settled(text, start, stop, is_last):
        nonlocal looked_through
        looked_through += stop - start
        return (stop if is_last else start), False

    buffer = text_buffer.TextBuffer(nothing_is_settled, block_bytes=100)
    assert sum(buffer.read_blocks([b"x" * 100] * 1000)) == 100_000
    assert looked_through < 4 * 100_000 and buffer.kept == 0


def test_when_one_thread_fails_the_others_are_told() -> None:
    stopped = threading.Event()

    def work(part: str) -> None:
        if part == "fails":
            raise ValueError("damaged")
        assert stopped.wait(60), "nobody told it"

    with pytest.raises(ValueError, match="damaged"):
        word_counter.in_threads(work, ["waits", "fails", "waits"], stop=stopped.set)


@pytest.mark.parametrize(
    ("max_ram", "threads"), [(1 << 40, 64), (2 << 30, 28), (300 << 20, 3), (200 << 20, 2), (1 << 20, 1)]
)
def test_a_ceiling_decides_how_many_threads_count(max_ram: int, threads: int) -> None:
    """Tables so small that every block of text fills one would go to disk all the time."""
    assert memory_estimate.threads_within(max_ram, 64) == threads
    assert memory_estimate.threads_within(max_ram, 1) == 1


def test_a_vocabulary_larger_than_any_corpus_gives(prose: Path, compiled: None) -> None:
    """Arrays are as large as the words allow, and merging ends when no pair is left."""
    tokens, merges = bpe_trainer(prose, 1 << 40)
    assert len(tokens) == 256 + len(merges)
    assert merges == train_merges(expected_counts(prose.read_bytes(), (), GPT2_PATTERN), 1 << 20, "greatest_bytes")


def test_a_full_table_starts_again(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    """Encoding stays right when the table of pretokens overflows again and again."""
    from cs336_numba_bpe import encoder

    monkeypatch.setattr(encoder, "STREAM_SLOTS", 1 << 13)
    monkeypatch.setattr(encoder, "FIRST_SLOTS", 1 << 13)
    source = random.Random(1)
    text = " ".join("".join(source.choices("abcdef", k=source.randrange(1, 30))) for _ in range(20_000))
    words = expected_counts(text.encode(), (), GPT2_PATTERN)
    merges = train_merges(dict(list(words.items())[:300]), 60, "greatest_bytes")
    vocab = dict(enumerate([bytes((byte,)) for byte in range(256)] + [left + right for left, right in merges]))
    compiled_tokenizer = Tokenizer(vocab, merges)
    plain = tokenizer._PythonEncoder(vocab, merges, (), GPT2_PATTERN)
    assert compiled_tokenizer.encode(text) == plain.encode(text)


@pytest.mark.parametrize("forced", ["compiled", "plain_python"])
def test_missing_bytes_and_unknown_ids(forced: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(forced)
    small = Tokenizer({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b")])
    assert small.encode("abba") == [2, 1, 0]
    with pytest.raises(ValueError, match="no token for the byte b'c'"):
        small.encode("abc")
    assert small.encode("ab") == [2], "a failed call must not leave ids behind"
    with pytest.raises(ValueError, match="no token with id 9"):
        small.decode([9])


def test_ids_from_2_31_on_are_encoded_too(compiled: None) -> None:
    vocab = {2**31 + byte: bytes((byte,)) for byte in range(256)}
    assert Tokenizer(vocab, []).encode("é") == [2**31 + 0xC3, 2**31 + 0xA9]


def test_importing_compiles_nothing_and_loads_no_numba() -> None:
    program = (
        "import sys, cs336_numba_bpe, cs336_numba_bpe.pretoken_counter, cs336_numba_bpe.bpe_trainer, "
        "cs336_numba_bpe.tokenizer\n"
        "assert not {'numba', 'llvmlite', 'torch', 'numpy'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_training_needs_neither_numba_nor_numpy_once_compiled(prose: Path) -> None:
    compile_cache.warmup()
    program = (
        "import sys\n"
        "from cs336_numba_bpe import corpus\n"
        "corpus.WARM_BYTES = 0\n"
        "from cs336_numba_bpe.bpe_trainer import bpe_trainer\n"
        "bpe_trainer(sys.argv[1], 400)\n"
        "assert not {'numba', 'llvmlite', 'torch', 'numpy'} & set(sys.modules), set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(prose)], check=True)


def test_damaged_machine_code_is_never_run(tmp_path: Path) -> None:
    """Cut or changed machine code is never run."""
    compile_cache.warmup()
    path = compile_cache.code_path("merge", compile_cache.default_cache_folder())
    copy = tmp_path / path.name
    good = path.read_bytes()
    copy.write_bytes(good)
    assert compile_cache._read(copy) is not None
    for damaged in (good[:-100], good[:2000] + b"\xcc" * 16 + good[2016:], b""):
        copy.write_bytes(damaged)
        assert compile_cache._read(copy) is None


@pytest.mark.slow
def test_object_code_that_is_no_image_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where code can't be laid out as an image, it is kept as object code, and gives the same merges."""
    words = expected_counts(samples.prose(3000, seed=7).encode(), (), GPT2_PATTERN)
    expected = MergeEngine(WordCounts.from_dict(words), 500, wide=True)
    monkeypatch.setattr(compile_cache, "flatten", lambda code, names: None)
    said: list[str] = []
    kernels = [load_kernels("merge_wide", private_folder(tmp_path / "cache"), said.append)]
    assert "once" in said[0] and "compiled in" in said[1]
    monkeypatch.setattr(compile_cache, "_loaded", {})
    kernels.append(load_kernels("merge_wide", tmp_path / "cache", said.append))
    assert len(said) == 2, "kept object code was compiled again"
    expected.run(244)
    for loaded in kernels:
        compiled = {"merge_wide": loaded, "count": load_kernels("count")}
        monkeypatch.setattr(merge_engine, "load_kernels", lambda group, compiled=compiled, **options: compiled[group])
        engine = MergeEngine(WordCounts.from_dict(words), 500, wide=True)
        engine.run(244)
        assert engine_merges(engine) == engine_merges(expected)


def test_images_are_made_of_code_that_refers_to_itself_alone() -> None:
    assert flatten(b"no object file", ["f"]) is None
    assert flatten(b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", 183) + bytes(60), ["f"]) is None, "another CPU"


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="chmod 700"):
        load_kernels("merge_wide", folder)


def test_where_no_cache_can_be_made_a_temporary_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = compile_cache.default_cache_folder()
    assert private_folder(folder).is_dir() and folder.parent == tmp_path


def test_other_patterns_run_through_regex(prose: Path, compiled: None) -> None:
    pattern = r"\w+|\W"
    assert pretoken_counter(prose, SPECIAL, pattern=pattern) == counter_contract.oracle(prose, SPECIAL, pattern=pattern)
    vocab, merges = bpe_trainer(prose, 300, SPECIAL, pattern=pattern)
    text = prose.read_bytes().decode("utf-8", "replace")[:3000]
    built = Tokenizer(vocab, merges, SPECIAL, pattern=pattern)
    assert built.decode(built.encode(text)) == text
    assert built.encode_to_array(prose).tolist() == built.encode(prose.read_bytes().decode("utf-8", "replace"))


def test_cl100k_ends_of_text(compiled: None) -> None:
    """White space at the end of a text is one pretoken, before special tokens too."""
    assert counted(b"a \n \n ", (), CL100K_PATTERN, 2) == {b"a": 1, b" \n \n ": 1}
    assert counted(b"a \n <|pad|> \nb", ("<|pad|>",), CL100K_PATTERN, 3) == {b"a": 1, b" \n ": 1, b" \n": 1, b"b": 1}


def test_frequent_words_change_no_id(tmp_path: Path, compiled: None, caplog: pytest.LogCaptureFixture) -> None:
    """Words kept with their ids are used for their own tokenizer alone, and a damaged file is not used at all."""
    text = samples.prose(8000, seed=4) + samples.tricky(3000, seed=4)
    path = tmp_path / "text.txt"
    path.write_text(text, newline="")
    vocab, merges = bpe_trainer(path, 600, SPECIAL)
    counts = pretoken_counter(path, SPECIAL) | {b"a" * 300: 5}
    expected = Tokenizer(vocab, merges, SPECIAL).encode(text)
    Tokenizer(vocab, merges, SPECIAL).keep_frequent_words(KeptCounts.of(counts), tmp_path)
    key = frequent_words.tokenizer_key(vocab, merges)
    kept = frequent_words.read(tmp_path, key)
    assert len(kept) == sum(count > 1 and len(word) < 256 for word, count in counts.items())
    built = Tokenizer(vocab, merges, SPECIAL, folder=tmp_path)
    assert built.encode(text) == expected and built.encode(text) == expected
    assert len(built._encoder_vocab.known) == len(kept)
    assert not caplog.records
    fewer = Tokenizer({token_id: vocab[token_id] for token_id in range(500)}, merges[:242], SPECIAL, folder=tmp_path)
    assert fewer._encoder_vocab.known is None and "belongs to another tokenizer" in caplog.text
    file = tmp_path / frequent_words.NAME
    for damaged in (b"", file.read_bytes()[:-3], file.read_bytes()[:200] + b"x" + file.read_bytes()[201:]):
        file.write_bytes(damaged)
        assert frequent_words.read(tmp_path, key) is None
    assert caplog.text.count("it is damaged") == 3


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    """Whichever write finds the disk full, the error says so, no half-written file stays, and a later run agrees."""
    monkeypatch.setattr(corpus, "SHARD_BYTES", 4000)
    monkeypatch.setattr(word_counter, "MIN_RANGE_BYTES", 1000)
    monkeypatch.setattr(word_counter, "RANGE_BYTES", 1000)
    monkeypatch.setattr(word_counter, "KEPT_FROM_BYTES", 0)
    expected = bpe_trainer(prose, 400, SPECIAL)
    fsync = os.fsync
    writes = failures = 0
    for full_at in range(1, 100, 6):
        cache = tmp_path / f"cache_{full_at}"
        writes = 0

        def full(descriptor: int, full_at: int = full_at) -> None:
            nonlocal writes
            writes += 1
            if writes >= full_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                bpe_trainer(prose, 400, SPECIAL, cache_dir=cache, checkpoint_every=20)
            except OSError as error:
                assert error.errno == errno.ENOSPC and "free some space and run it again" in str(error)
                failures += 1
        assert not list(cache.rglob("*.tmp"))
        assert bpe_trainer(prose, 400, SPECIAL, cache_dir=cache, checkpoint_every=20) == expected
        if writes < full_at:
            break
    assert failures > 3 and writes < full_at, "every write was meant to fail once"
