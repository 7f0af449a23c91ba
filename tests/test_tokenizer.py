"""The tokenizer: its promises, and tiktoken and Hugging Face's tokenizers built from our own vocab and merges."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cs336_registry.components.tokenizer import NaiveTokenizer
from cs336_registry.text import samples
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN
from cs336_registry.text.vocab_files import token_to_text, write_merges, write_vocab
from tests.corpora import SPECIAL_TOKENS, english, vocabulary

TEXTS = {
    "empty": "",
    "letter": "s",
    "emoji": "🙃",
    "sentence": "Hello, how are you?",
    "unicode": "Héllò hôw are ü? 🙃 東京",
    "special_tokens": "Héllò hôw <|endoftext|><|endoftext|> are ü? 🙃<|endoftext|>",
    "special_token_at_the_end": "the end\n<|endoftext|>",
    "newlines": "one\n\ntwo\r\n\r\n  three \n<|endoftext|>\n\n",
    "contractions": "I'll we've they're it's I'd don't 'S 'LL ''s",
    "numbers": "3.14159 and 1,000,000 and ٣٤٥ and x²",
    "spaces": "a  b   c    d \t e \u3000 f \xa0 g",
    "english": english(20_000),
    "tricky": samples.tricky(2000, seed=7),
}


@pytest.fixture
def tokenizer(implementation_of):
    return implementation_of("tokenizer")


@pytest.fixture(params=["gpt2", "cl100k"])
def pattern(request):
    return {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN}[request.param]


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_round_trip(tokenizer, name):
    built = tokenizer(*vocabulary(), SPECIAL_TOKENS)
    assert built.decode(built.encode(TEXTS[name])) == TEXTS[name]


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_matches_tiktoken(tokenizer, pattern, name):
    tiktoken = pytest.importorskip("tiktoken", reason="needs the extra `export`")
    vocab, merges = vocabulary(pattern)
    special = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    ranks = {token: token_id for token_id, token in vocab.items() if token_id >= len(special)}
    other = tiktoken.Encoding("ours", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    built = tokenizer(vocab, merges, SPECIAL_TOKENS, pattern=pattern)
    ids = built.encode(TEXTS[name])
    assert ids == other.encode(TEXTS[name], allowed_special="all")
    assert built.decode(ids) == other.decode(ids)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_matches_hugging_face(tokenizer, name):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `export`")
    vocab, merges = vocabulary()
    model = tokenizers.models.BPE(
        {token_to_text(token): token_id for token_id, token in vocab.items()},
        [(token_to_text(left), token_to_text(right)) for left, right in merges],
    )
    other = tokenizers.Tokenizer(model)
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = tokenizers.decoders.ByteLevel()
    other.add_special_tokens(SPECIAL_TOKENS)
    assert tokenizer(vocab, merges, SPECIAL_TOKENS).encode(TEXTS[name]) == other.encode(TEXTS[name]).ids


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_without_special_tokens_their_text_is_ordinary(tokenizer, name):
    tiktoken = pytest.importorskip("tiktoken", reason="needs the extra `export`")
    vocab, merges = vocabulary()
    ranks = {token: token_id for token_id, token in vocab.items() if token_id >= len(SPECIAL_TOKENS)}
    other = tiktoken.Encoding("ours", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert tokenizer(vocab, merges).encode(TEXTS[name]) == other.encode(TEXTS[name], disallowed_special=())


def test_overlapping_special_tokens(tokenizer):
    special = [samples.END_OF_TEXT, samples.END_OF_TEXT * 2]
    built = tokenizer(*vocabulary(), special)
    text = f"Hello{samples.END_OF_TEXT * 2} there{samples.END_OF_TEXT * 3}"
    pieces = [built.decode([token_id]) for token_id in built.encode(text)]
    assert pieces.count(samples.END_OF_TEXT * 2) == 2
    assert pieces.count(samples.END_OF_TEXT) == 1
    assert built.decode(built.encode(text)) == text


def test_cut_characters_decode_to_the_replacement_character(tokenizer):
    built = tokenizer({number: bytes((number,)) for number in range(256)}, [])
    assert built.decode("🙂".encode()[:-1]) == "\ufffd"
    assert built.decode(b"a\xffb\xc3") == "a\ufffdb\ufffd"


def test_lone_surrogates_become_the_replacement_character(tokenizer):
    built = tokenizer(*vocabulary(), SPECIAL_TOKENS)
    assert built.decode(built.encode("a\ud800b \udfff")) == "a\ufffdb \ufffd"
    assert list(built.encode_iterable(["a\ud83d", "\ude42"])) == built.encode("a\ud83d\ude42") == built.encode("a🙂")


def test_from_files(tokenizer, tmp_path):
    vocab, merges = vocabulary()
    write_vocab(vocab, tmp_path / "vocab.json")
    write_merges(merges, tmp_path / "merges.txt")
    built = tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", SPECIAL_TOKENS)
    assert built.encode(TEXTS["tricky"]) == tokenizer(vocab, merges, SPECIAL_TOKENS).encode(TEXTS["tricky"])
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.json: pass the path of a vocab\.json"):
        tokenizer.from_files(tmp_path / "missing.json", tmp_path / "merges.txt")


PIECES = st.lists(st.sampled_from(samples.TRICKY), max_size=25)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.one_of(PIECES, st.lists(st.text(max_size=10), max_size=10)), special=st.booleans())
def test_any_text_in_any_pieces(tokenizer, pattern, pieces, special):
    vocab, merges = vocabulary(pattern)
    tokens = SPECIAL_TOKENS if special else None
    built = tokenizer(vocab, merges, tokens, pattern=pattern)
    expected = NaiveTokenizer(vocab, merges, tokens, pattern=pattern).encode("".join(pieces))
    assert built.encode("".join(pieces)) == expected
    assert list(built.encode_iterable(pieces)) == expected
    assert built.decode(expected) == "".join(pieces)


def test_encode_iterable_of_a_file(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(english(50_000), encoding="utf-8", newline="")
    built = tokenizer(*vocabulary(), SPECIAL_TOKENS)
    with open(path, encoding="utf-8", newline="") as lines:
        assert list(built.encode_iterable(lines)) == built.encode(english(50_000))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the resource module")
def test_encode_iterable_memory(tokenizer, tmp_path):
    """From outside: a fresh process encodes 30 MB, and its peak stays within 50 MB of where it was before."""
    vocab, merges = vocabulary()
    write_vocab(vocab, tmp_path / "vocab.json")
    write_merges(merges, tmp_path / "merges.txt")
    files = [str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")]
    # Documents of few distinct words keep the run short; the stream is what has the size.
    program = f"""
        import resource, sys
        from {tokenizer.__module__} import {tokenizer.__qualname__} as tokenizer
        built = tokenizer.from_files(*{files!r}, {SPECIAL_TOKENS!r})
        line = "a few words of a line, " + "<|endoftext|>" * 100
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        for _ in built.encode_iterable(line for _ in range(100)):
            pass
        before = peak()
        count = sum(1 for _ in built.encode_iterable(line for _ in range(30_000_000 // len(line))))
        print(count, peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    count, growth = map(int, result.stdout.split())
    assert count > 2_000_000
    assert growth < 50_000_000, f"the peak grew by {growth} bytes"
