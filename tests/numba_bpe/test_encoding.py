"""The encoder's arrays: whole files on threads, parts of files, ids of either width, and what training left for it."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cs336_numba_bpe import blocks, constants, encoder
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


def test_threads_share_a_tokenizer(text: str, compiled: None) -> None:
    """One tokenizer, many threads: each of them has tables of its own while it encodes."""
    built = Tokenizer(vocabulary(), MERGES, [END])
    expected = built.encode(text)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(built.encode, [text] * 24)) == [expected] * 24


def test_threads_encode_files_with_one_tokenizer(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    """Tables are copied for more threads while other calls use the first ones, and change them with what they meet."""
    monkeypatch.setattr(module, "RANGE_BYTES", 300)
    monkeypatch.setattr(module, "SEEDING_BYTES", 0)
    built, paths = Tokenizer(vocabulary(), MERGES, [END]), []
    for index in range(8):
        paths.append(tmp_path / f"{index}.txt")
        paths[-1].write_text(f" word{index}" * 50 + text + f" other{index}" * 50, encoding="utf-8", newline="")
    expected = [built.encode(path.read_bytes().decode()) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        for num_threads in (1, 2, 3) * 3:
            found = pool.map(lambda path, n=num_threads: built.encode_to_array(path, num_threads=n).tolist(), paths)
            assert list(found) == expected


def test_what_is_known_before_fits_whatever_its_length(compiled: None) -> None:
    """Long pretokens may pass what an arena is cleared at."""
    source = random.Random(5)
    seeds = [bytes(source.choices(b"abcdefghijklmnop", k=100)) for _ in range(900)]
    built = Tokenizer(BYTES, [], seed_words=seeds)
    table = encoder.EncodeTable(built._encoder_vocab, max_slots=1 << 12)
    assert table.state[constants.ARENA_USED] == 900 * 100 <= len(table.arena)
    assert table.state[constants.IDS_USED] == 900 * 101 <= len(table.ids_arena)
    built._stream_tables.append(table)
    text = b" ".join(seeds).decode()
    assert built.encode(text) == list(text.encode())


def test_a_tokenizer_that_has_encoded_is_pickled(text: str, compiled: None) -> None:
    built = Tokenizer(vocabulary(), MERGES, [END])
    ids = built.encode(text)
    built.prepare()
    for other in (pickle.loads(pickle.dumps(built)), copy.deepcopy(built)):
        assert other.encode(text) == ids
    assert built.encode(text) == ids


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are posix")
def test_a_named_pipe_is_read(tmp_path: Path, compiled: None) -> None:
    pipe, built = tmp_path / "pipe", Tokenizer(vocabulary(), MERGES, [END])
    os.mkfifo(pipe)
    for encode in (built.encode_to_array, lambda path: np.concatenate(list(built.encode_arrays(path)))):
        writer = threading.Thread(target=pipe.write_bytes, args=(b"then the end",))
        writer.start()
        assert encode(pipe).tolist() == built.encode("then the end")
        writer.join()


def test_many_malformed_bytes_in_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    """U+FFFD takes more ids than the byte it replaces, more than were expected of the range."""
    monkeypatch.setattr(module, "RANGE_BYTES", 10)
    content = b"\xff" * 5000 + b" the\n" * 300
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    expected = NaiveTokenizer(vocabulary(), MERGES, [END], pattern=GPT2_PATTERN).encode(
        content.decode("utf-8", "replace")
    )
    for num_threads in (1, 2):
        built = Tokenizer(vocabulary(), MERGES, [END])
        assert built.encode_to_array(path, num_threads=num_threads).tolist() == expected


def test_an_array_that_may_not_be_asked_for(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    """Where the system refuses room for an id for every byte, the parts are put together at the end."""
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8", newline="")
    built = Tokenizer(vocabulary(), MERGES, [END])
    expected = built.encode_to_array(path, num_threads=1).tolist()
    zeros, refused = blocks.zeros, []

    def refuse(kind: blocks.Kind, *shape: int) -> memoryview:
        if shape == (2 * path.stat().st_size + module.SPARE_OUTPUT,):
            refused.append(shape)
            raise OSError(12, "Cannot allocate memory")
        return zeros(kind, *shape)

    monkeypatch.setattr(blocks, "zeros", refuse)
    assert built.encode_to_array(path, num_threads=1).tolist() == expected
    assert len(refused) == 1


def test_memory_is_given_back(text: str, compiled: None) -> None:
    """A kernel that is called repeatedly holds on to no text and no ids."""
    built = Tokenizer(vocabulary(), MERGES, [END])
    built.encode(text)
    (table,) = built._stream_tables
    own, table.output = table.output, np.empty(1 << 16, np.uint8)
    there = weakref.ref(table.output)
    table(memoryview(bytearray(b"the the" + bytes(200))), 0, 7, True)
    assert table.take().tolist() == built.encode("the the")
    table.forget(table.output)
    table.output = own
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("compressing", [True, False])
def test_set_bits(compressing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positions of set bits, by the one instruction that some CPUs have for it and without it."""
    numba = pytest.importorskip("numba")
    from cs336_numba_bpe.kernels import intrinsics

    if compressing and not intrinsics.CAN_COMPRESS:
        pytest.skip("this CPU does not have the instruction")
    monkeypatch.setattr(intrinsics, "CAN_COMPRESS", compressing)
    store_set_bits = numba.njit(intrinsics.store_set_bits.py_func)
    address_of = intrinsics.address_of

    @numba.njit
    def positions(mask, base, found):
        store_set_bits(address_of(found), base, mask)

    source = random.Random(0)
    masks = [0, 1, 1 << 63, 2**64 - 1, *(source.getrandbits(64) & source.getrandbits(64) for _ in range(50))]
    for mask in masks:
        found = np.zeros(72, np.int64)
        positions(np.uint64(mask), 1000, found)
        expected = [1000 + place for place in range(64) if mask >> place & 1]
        assert found[: len(expected)].tolist() == expected
