"""Training a tokenizer: against the definition, against Hugging Face's trainer, and on what the course asks for."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cs336_registry.components import bpe_trainer as contract
from cs336_registry.text import samples
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN
from cs336_registry.text.vocab_files import text_to_token
from tests.corpora import SPECIAL_TOKENS, english


@pytest.fixture
def train(implementation_of):
    return implementation_of("bpe_trainer")


@pytest.fixture
def count(implementation_of):
    return implementation_of("pretoken_counter")


def write(folder: Path, text: str | bytes, name: str = "corpus.txt") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_train_bpe(train, tmp_path):
    corpus = write(tmp_path, english(30_000))
    assert train(corpus, 400, SPECIAL_TOKENS) == contract.oracle(corpus, 400, SPECIAL_TOKENS)


def test_train_bpe_special_tokens(train, tmp_path):
    vocab, _ = train(write(tmp_path, english(60_000)), 700, SPECIAL_TOKENS)
    assert [vocab[0], vocab[1]] == [token.encode() for token in SPECIAL_TOKENS]
    assert not [token for token in vocab.values() if b"<|" in token and token.decode() not in SPECIAL_TOKENS]


def test_a_path_may_be_a_string(train, tmp_path):
    corpus = write(tmp_path, "a few words are a few words")
    assert train(str(corpus), 270, []) == train(corpus, 270) == train([corpus], 270, ())


def test_merges_are_those_of_hugging_face(train, tmp_path):
    """With ties broken as Hugging Face's trainer does, its merges are ours, merge by merge."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `export`")
    text = english(130_000)
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    other.train_from_iterator(text.split(samples.END_OF_TEXT), trainer)
    expected = [tuple(map(text_to_token, merge)) for merge in json.loads(other.to_str())["model"]["merges"]]
    _, merges = train(write(tmp_path, text), 1500, SPECIAL_TOKENS, tie_break="smallest_ids")
    differing = next(
        (n for n, (ours, theirs) in enumerate(zip(merges, expected, strict=False)) if ours != theirs), None
    )
    assert differing is None, f"merge {differing}: {merges[differing]} here, {expected[differing]} there"
    assert len(merges) == len(expected)


def test_ties_go_to_the_greatest_pair(train, tmp_path):
    """The course's example: of (A, B), (A, C), (B, ZZ) and (BA, A), the last is the greatest."""
    corpus = write(tmp_path, "xy xz ab")
    _, merges = train(corpus, 257, pattern=r"\w+")
    assert merges == [(b"x", b"z")]
    _, merges = train(corpus, 257, pattern=r"\w+", tie_break="smallest_ids")
    assert merges == [(b"a", b"b")]


TRICKY_TEXT = st.lists(st.sampled_from(samples.TRICKY), max_size=40).map("".join)
ALPHABETS = ("ab", "abc ", "a", "é日 🙂", "0aA '\n", "-=")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(*(st.text(alphabet, max_size=80) for alphabet in ALPHABETS), TRICKY_TEXT),
    merges=st.integers(0, 40),
    tie_break=st.sampled_from(["greatest_bytes", "smallest_ids"]),
    pattern=st.sampled_from([GPT2_PATTERN, CL100K_PATTERN, r"\S+"]),
)
def test_any_text_trains_as_defined(train, text, merges, tie_break, pattern):
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder), "x" + text)
        arguments = {"special_tokens": SPECIAL_TOKENS, "pattern": pattern, "tie_break": tie_break}
        trained = train(corpus, 258 + merges, **arguments)
        assert trained == contract.oracle(corpus, 258 + merges, **arguments)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=100), TRICKY_TEXT.map(str.encode)),
    pattern=st.sampled_from([GPT2_PATTERN, CL100K_PATTERN]),
)
def test_any_bytes_count_as_defined(count, content, pattern):
    from cs336_registry.components import pretoken_counter

    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder), content)
        expected = pretoken_counter.oracle(corpus, SPECIAL_TOKENS, pattern=pattern)
        assert count(corpus, SPECIAL_TOKENS, pattern=pattern) == expected


def test_nothing_is_written_beside_the_corpus(train, count, tmp_path):
    corpus = write(tmp_path, english(5_000))
    train(corpus, 300, SPECIAL_TOKENS)
    count(corpus, SPECIAL_TOKENS)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.txt"]
