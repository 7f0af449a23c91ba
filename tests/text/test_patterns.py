"""Patterns, special tokens, and where text may be cut."""

from __future__ import annotations

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_registry.components.pretoken_counter import OVERLAPPING, SPECIAL_TOKENS, split_on_special_tokens
from cs336_registry.text import samples
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN, check_pattern, pattern_named, pretoken_finder
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import check_special_tokens, special_token_pattern

OWN_PATTERN = r"\S+|\s+(?=\S)|\s"
TRICKY_TEXT = st.lists(st.sampled_from(samples.TRICKY), max_size=30).map("".join)


def tokens_of(text, pattern, special_tokens):
    tokens = []
    for part, is_special in split_on_special_tokens(text, special_tokens):
        tokens.extend([(part, True)] if is_special else [(match, False) for match in pretoken_finder(pattern)(part)])
    return tokens


def test_gpt2():
    text = "I'll go — it's 42°C,  really!\n\n  Über  "
    assert pretoken_finder(GPT2_PATTERN)(text) == [
        *("I", "'ll", " go", " —", " it", "'s", " 42", "°", "C", ",", " ", " really", "!", "\n\n ", " Über", "  ")
    ]


def test_cl100k():
    text = "I'LL pay $12345,\n\n (x)  "
    assert pretoken_finder(CL100K_PATTERN)(text) == [
        "I",
        "'LL",
        " pay",
        " $",
        "123",
        "45",
        ",\n\n",
        " (",
        "x",
        ")",
        "  ",
    ]


@given(st.one_of(st.text(max_size=50), TRICKY_TEXT))
def test_named_patterns_lose_nothing(text):
    assert "".join(pretoken_finder(GPT2_PATTERN)(text)) == text
    assert "".join(pretoken_finder(CL100K_PATTERN)(text)) == text


def test_own_patterns_may_have_groups_and_empty_matches():
    assert list(pretoken_finder(r"(a)(b)|c*")("abxccy")) == ["ab", "cc"]


def test_pattern_errors():
    assert pattern_named("gpt2") == GPT2_PATTERN
    with pytest.raises(ValueError, match="no pattern named 'gpt3': choose one of gpt2, cl100k"):
        pattern_named("gpt3")
    with pytest.raises(ValueError, match=r"pattern '\[' is not a regular expression"):
        check_pattern("[")
    with pytest.raises(TypeError, match="pattern is None: it must be a string"):
        check_pattern(None)


def test_special_token_errors():
    assert check_special_tokens(None) == ()
    assert check_special_tokens(["b", "a"]) == ("b", "a")
    with pytest.raises(TypeError, match=r"special_tokens\[0\] is 7"):
        check_special_tokens([7])
    with pytest.raises(ValueError, match="has a lone surrogate"):
        check_special_tokens(["\ud800"])


@given(TRICKY_TEXT, st.sampled_from([SPECIAL_TOKENS, OVERLAPPING, ("a", "aa", ".*", "<|")]))
def test_the_longest_special_token_wins(text, special_tokens):
    split = special_token_pattern(special_tokens).split(text)
    expected = list(split_on_special_tokens(text, special_tokens))
    assert [(part, number % 2 == 1) for number, part in enumerate(split)] == expected


@settings(max_examples=300)
@given(
    st.lists(TRICKY_TEXT, max_size=8),
    st.sampled_from([(), SPECIAL_TOKENS, OVERLAPPING, ("a b", " ", "\n")]),
    st.sampled_from([GPT2_PATTERN, CL100K_PATTERN, OWN_PATTERN]),
    st.integers(1, 12),
)
def test_safe_chunks_keep_every_token(pieces, special_tokens, pattern, size):
    chunks = list(safe_chunks(pieces, pattern, special_tokens, chunk_characters=size))
    text = "".join(pieces)
    assert "".join(chunks) == text
    found = [token for chunk in chunks for token in tokens_of(chunk, pattern, special_tokens) if token[0]]
    assert found == [token for token in tokens_of(text, pattern, special_tokens) if token[0]]


@pytest.mark.parametrize("line", ["word ", "日本，", "x.\n", "'ll", "12 "])
def test_safe_chunks_are_small_wherever_pretokens_are(line):
    chunks = list(safe_chunks([line] * 10_000, GPT2_PATTERN, chunk_characters=1000))
    assert max(map(len, chunks)) < 2100


def test_one_long_pretoken_is_looked_at_a_few_times_only(monkeypatch):
    looks = []
    compiled = regex.compile(GPT2_PATTERN)

    class Counting:
        def finditer(self, *arguments):
            looks.append(len(arguments[0]))
            return compiled.finditer(*arguments)

    monkeypatch.setattr("cs336_registry.text.pretokens.compiled", lambda pattern: Counting())
    assert list(safe_chunks(["a" * 1000] * 1000, GPT2_PATTERN, chunk_characters=1000)) == ["a" * 1_000_000]
    assert sum(looks) < 3_000_000


def test_pieces_must_be_strings():
    with pytest.raises(TypeError, match="the iterable gave b'a': it must give strings"):
        list(safe_chunks([b"a"], GPT2_PATTERN))
