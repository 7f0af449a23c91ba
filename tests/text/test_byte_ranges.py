"""Files are cut often, in bounded memory, and never inside a pretoken."""

from __future__ import annotations

import io
import random
import tracemalloc
from itertools import pairwise, product

import pytest

from cs336_registry.components.pretoken_counter import split_on_special_tokens
from cs336_registry.text import byte_ranges, samples
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN, pretoken_finder

PATTERNS = pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K_PATTERN], ids=["gpt2", "cl100k"])
PIECES = [
    *(
        piece.encode()
        for piece in ("a", "1", ".", "'s", "。", "天", "\u0301", "\x00", " ", "\n", "\r", "\x85", "\u3000")
    ),
    *(b"\xe3\x80", b"\x80"),
]
"""One of each class that the patterns tell apart, and parts of characters."""


def pretokens(content, pattern, special_tokens=()):
    found = []
    for part, is_special in split_on_special_tokens(content.decode("utf-8", "replace"), special_tokens):
        found += [part] if is_special else pretoken_finder(pattern)(part)
    return found


def check(path, content, pattern, special_tokens=()):
    """The pretokens of all ranges are those of the whole; returns how many ranges there are."""
    path.write_bytes(content)
    ranges = byte_ranges.byte_ranges(path, pattern, special_tokens, 1)
    parts = [content[start:end] for start, end in ranges]
    assert b"".join(parts) == content
    found = [token for part in parts for token in pretokens(part, pattern, special_tokens)]
    assert found == pretokens(content, pattern, special_tokens), (content, parts)
    return len(ranges)


@PATTERNS
def test_every_neighbourhood_keeps_its_pretokens(tmp_path, pattern):
    """All sequences of four pieces, each joined to the next by a special token; then longer ones."""
    source = random.Random(5)
    sequences = [b"".join(pieces) for pieces in product(PIECES, repeat=4)]
    content = b"<|endoftext|>".join(source.sample(sequences, 3000))
    assert check(tmp_path / "text", content, pattern, ["<|endoftext|>"]) > 800
    for _ in range(20):
        check(tmp_path / "text", b"".join(source.choices(PIECES, k=300)), pattern)


@PATTERNS
@pytest.mark.parametrize("window", [1, 50])
@pytest.mark.parametrize("special_tokens", [(), ("。\n",), ("\n天", "a b"), ("天" * 9, "\u3000")])
def test_windows_overlap_by_what_decides(tmp_path, monkeypatch, pattern, window, special_tokens):
    for seed in range(6):
        source = random.Random(seed)
        pieces = ["天地玄黃。\n", "天" * 9, "a b", "。\n天\n", "日月 盈昃", "\u3000\u3000天", "é\n", "\n", "?"]
        content = "".join(source.choices(pieces, k=80)).encode() + samples.tricky_bytes(40, seed=seed)
        cuts = {}
        for size in (window, 1 << 16):
            monkeypatch.setattr(byte_ranges, "WINDOW", size)
            check(tmp_path / "text", content, pattern, special_tokens)
            cuts[size] = byte_ranges.byte_ranges(tmp_path / "text", pattern, special_tokens, 1)
        assert cuts[window] == cuts[1 << 16]


def test_a_token_of_an_unknown_pattern_is_found_in_any_window(tmp_path, monkeypatch):
    tokens = ("<|end|>", "|>|>", "<|end|><|end|>")
    content = "".join(random.Random(2).choices(["x", "日本", " ", *tokens], k=400)).encode()
    (tmp_path / "text").write_bytes(content)
    expected = byte_ranges.byte_ranges(tmp_path / "text", r"\S+|\s+", tokens, 1)
    assert len(expected) > 50
    for window in (1, 7, 60):
        monkeypatch.setattr(byte_ranges, "WINDOW", window)
        assert byte_ranges.byte_ranges(tmp_path / "text", r"\S+|\s+", tokens, 1) == expected


@PATTERNS
@pytest.mark.parametrize(
    "line", ["天地玄黃，宇宙洪荒。\n", "これはペンです\n", "это строка «текста» без конца ", "ça va là\n"]
)
def test_text_that_is_not_ascii_is_cut_as_often(tmp_path, pattern, line):
    (tmp_path / "text").write_text(line * 400, encoding="utf-8", newline="")
    ranges = byte_ranges.byte_ranges(tmp_path / "text", pattern, ["<|endoftext|>"], 200)
    assert max(end - start for start, end in ranges) < 200 + 2 * len(line.encode())


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K_PATTERN, r"\S+|\s+"], ids=["gpt2", "cl100k", "own"])
@pytest.mark.parametrize("line", ["。", "天", " ", "\n\r", "\u3000\n", "\x85 "])
def test_a_file_without_a_cut_takes_little_memory(tmp_path, monkeypatch, pattern, line):
    monkeypatch.setattr(byte_ranges, "WINDOW", 1 << 10)
    (tmp_path / "text").write_text(line * 50_000, encoding="utf-8", newline="")
    byte_ranges.byte_ranges(tmp_path / "text", pattern, ["<|endoftext|>"], 1000)
    tracemalloc.start()
    try:
        assert byte_ranges.byte_ranges(tmp_path / "text", pattern, ["<|endoftext|>"], 1000) == [
            (0, (tmp_path / "text").stat().st_size)
        ]
        assert tracemalloc.get_traced_memory()[1] < 60_000
    finally:
        tracemalloc.stop()


def test_ranges_follow_each_other(tmp_path):
    (tmp_path / "text").write_text(samples.prose(3000, seed=1), encoding="utf-8", newline="")
    ranges = byte_ranges.byte_ranges(tmp_path / "text", GPT2_PATTERN, (), 500)
    assert len(ranges) > 10
    assert all(one[1] == other[0] for one, other in pairwise(ranges))


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, r"\S+|\s+"], ids=["gpt2", "own"])
def test_a_file_that_becomes_shorter_ends_the_search(tmp_path, monkeypatch, pattern):
    (tmp_path / "text").write_bytes(b"a" * 100_000)
    monkeypatch.setattr(byte_ranges, "open", lambda path, mode: io.BytesIO(b"a" * 50_000), raising=False)
    assert byte_ranges.byte_ranges(tmp_path / "text", pattern, ["<|endoftext|>"], 1000) == [(0, 100_000)]
