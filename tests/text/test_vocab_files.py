"""vocab.json and merges.txt in GPT-2's layout."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs336_registry.text.vocab_files import (
    BYTES_IN_CHARACTER_ORDER,
    read_merges,
    read_vocab,
    text_to_token,
    token_to_text,
    write_merges,
    write_vocab,
)
from tests.corpora import vocabulary


@given(st.binary())
def test_every_token_has_a_visible_text(token):
    text = token_to_text(token)
    assert text_to_token(text) == token
    assert not any(character.isspace() for character in text)


def test_the_characters_are_those_of_gpt2():
    assert token_to_text(b" the\n\x00\xc2\xad") == "ĠtheĊĀÂŃ"
    assert BYTES_IN_CHARACTER_ORDER[:2] == (ord("!"), ord('"'))
    assert sorted(BYTES_IN_CHARACTER_ORDER) == list(range(256))


def test_round_trip(tmp_path):
    vocab, merges = vocabulary()
    write_vocab(vocab, tmp_path / "vocab.json")
    write_merges(merges, tmp_path / "merges.txt")
    assert read_vocab(tmp_path / "vocab.json") == vocab
    assert read_merges(tmp_path / "merges.txt") == merges


def test_special_tokens_may_be_written_as_plain_text(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "<end of text>": 1, "é": 2}', encoding="utf-8")
    assert read_vocab(tmp_path / "vocab.json") == {0: b"a", 1: b"<end of text>", 2: b"\xe9"}
    assert read_vocab(tmp_path / "vocab.json", ["é"])[2] == "é".encode()


def test_merges_without_a_header_and_with_windows_newlines(tmp_path):
    (tmp_path / "merges.txt").write_bytes("Ġ t\r\nh e\r\n\r\n".encode())
    assert read_merges(tmp_path / "merges.txt") == [(b" ", b"t"), (b"h", b"e")]


def test_two_ids_for_the_same_bytes_can_not_be_written(tmp_path):
    with pytest.raises(ValueError, match="vocab ids 0 and 98 are both b'a'"):
        write_vocab({0: b"a", 98: b"a"}, tmp_path / "vocab.json")
    assert not (tmp_path / "vocab.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list"),
        ('{"a": "b"}', "the id of 'a' is 'b'"),
        ('{"a": -1}', "the id of 'a' is -1"),
        ('{"a": true}', "the id of 'a' is True"),
        ('{"a": 1, "b": 1}', "id 1 is given to 'b' and to another token"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_bad_vocab_files(tmp_path, content, message):
    path = tmp_path / "vocab.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_vocab(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a b c", "line 2 is 'a b c': expected two tokens"),
        ("ab", "line 2 is 'ab'"),
        ("a  b", "line 2"),
        ("a 日", "line 2: '日' stands for no byte"),
    ],
)
def test_bad_merges_files(tmp_path, line, message):
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_merges(tmp_path / "merges.txt")
