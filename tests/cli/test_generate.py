"""Generation with a KV cache is generation without one; its text is whole characters; its errors say what to do."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cs336_registry as registry
from cs336_registry.cli import main
from cs336_registry.cli.generate import _show
from cs336_registry.pipeline import training
from cs336_registry.pipeline.completion import complete, stop_token
from cs336_registry.pipeline.decoding import Sampling, Speed, TextStream, stream
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.trained import TrainedModel, load
from tests.pipeline.conftest import TINY
from tests.pipeline.conftest import load as load_configuration


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A model that was trained for a few steps on words with characters of two, three and four bytes."""
    folder = tmp_path_factory.mktemp("generate")
    words = ["naïve", "☃", "cat", "🙂", "sees", "über", "日本", "the"]
    text = "<|endoftext|>".join(" ".join(words[(i * k) % 8] for i in range(90)) for k in range(1, 30))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    shape = ["model.num_heads=4", "model.num_kv_heads=2", "model.d_model=32", "model.num_layers=2"]
    configuration = load_configuration("quickstart", [*TINY, f'data.train="{folder / "text.txt"}"', *shape])
    training.train(configuration, folder / "run", progress=Progress(quiet=True))
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run) -> TrainedModel:
    return load(run)


SAMPLINGS = {
    "cold": {"temperature": 0.3},
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 3},
    "top_k_and_top_p": {"temperature": 1.5, "top_k": 20, "top_p": 0.7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("prompt_length", [1, 5, 15, 16, 21])
@pytest.mark.parametrize("sampling", sorted(SAMPLINGS))
def test_the_cache_changes_no_token(backend, prompt_length, sampling):
    """In float64, where two roundings do not change which token is drawn; 40 tokens go far beyond 16 of context."""
    build = registry.get("transformer_lm", backend=backend)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = build(50, 16, 32, 2, 4, 48, 10_000.0, num_kv_heads=2).double().requires_grad_(False)
    prompt = torch.randint(50, (3, prompt_length), generator=torch.Generator().manual_seed(2))
    options = {"top_k": None, "top_p": None} | SAMPLINGS[sampling]
    generate = registry.get("generate", backend=backend)
    expected = generate(model, prompt, 40, stop_token_ids=(3, 4), generator=torch.Generator().manual_seed(9), **options)
    chosen = Sampling(max_new_tokens=40, seed=9, **options)
    found = torch.tensor(list(stream(model, prompt, generate, chosen, stop_token_ids=(3, 4)))).T
    assert torch.equal(found, expected[:, prompt_length:])
    without = torch.tensor(list(stream(model, prompt, generate, chosen, stop_token_ids=(3, 4), use_cache=False))).T
    assert torch.equal(without, found)


def test_with_a_cache_only_new_tokens_are_computed(trained):
    given = []
    handle = trained.model.get_submodule("token_embeddings").register_forward_pre_hook(
        lambda module, arguments: given.append(arguments[0].shape[1])
    )
    try:
        list(stream(trained.model, torch.tensor([[1, 2, 3]]), trained.components["generate"], Sampling(16)))
    finally:
        handle.remove()
    # 3 + 13 tokens fill the context of 16: the last two steps read a window of 16.
    assert given == [3, *[1] * 13, 16, 16]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=5), max_size=12))
def test_the_pieces_are_what_decoding_all_at_once_gives(tokens):
    text = TextStream(dict(enumerate(tokens)))
    pieces = [text.push(token_id) for token_id in range(len(tokens))]
    assert "".join(pieces) + text.finish() == b"".join(tokens).decode("utf-8", "replace")


def test_incomplete_characters_are_held_back():
    text = TextStream({0: "☃".encode()[:2], 1: "☃".encode()[2:], 2: b"a"})
    assert [text.push(token_id) for token_id in (0, 1, 2, 99, 0)] == ["", "☃", "a", "", ""]
    assert text.finish() == "�"


def test_a_batch_of_samples_streams_its_first_row(trained):
    seen: list[str] = []
    speed = Speed()
    sampling = Sampling(30, temperature=1.0, top_p=None, seed=3)
    first, second = complete(trained, ["the cat", "☃"], sampling, samples=3, watch=seen.append, speed=speed)
    assert [one.sample for one in first] == [0, 1, 2] and first[0].prompt == "the cat"
    assert "".join(seen) == first[0].text + second[0].text
    assert len({one.text for one in first}) == 3
    assert speed.decoded_tokens >= 2 * 3 * 20 and speed.prefill_tokens > 6 and speed.decode_seconds > 0
    # A prompt's texts depend on its number and the seed alone.
    again = next(complete(trained, ["the cat"], sampling, samples=3))
    assert again == first
    other = next(complete(trained, ["the cat"], Sampling(30, temperature=1.0, top_p=None, seed=4), samples=3))
    assert [one.text for one in other] != [one.text for one in first]


def test_stop_tokens_end_a_text_and_are_left_out(trained):
    sampling = Sampling(200, temperature=1.0, top_p=None)
    (free,) = next(complete(trained, [""], sampling))
    letter = next(character for character in free.text if character.isascii())
    (stopped,) = next(complete(trained, [""], sampling, stop=[letter]))
    assert stopped.stopped and letter not in stopped.text and free.text.startswith(stopped.text)
    assert stop_token(trained.tokenizer, "<|endoftext|>") == trained.tokenizer.end_of_text_id
    with pytest.raises(ValueError, match=r"stop text 'q:x' is 3 tokens of this tokenizer \(\['q', ':', 'x'\]\)"):
        next(complete(trained, [""], sampling, stop=["q:x"]))


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *words])
    return stopped.value.code or 0


def test_the_command_prints_prompt_and_text_and_reports_speed(run, capsys):
    assert command(str(run), "--prompt", "the cat", "--max-new-tokens", "12", "--temperature", "0") == 0
    cached = capsys.readouterr()
    assert cached.out.startswith("the cat") and cached.out.endswith("\n") and len(cached.out) > 10
    assert "prefill " in cached.err and "decode " in cached.err and "tokens/s" in cached.err
    assert command(str(run), "--prompt", "the cat", "--max-new-tokens", "12", "--temperature", "0", "--no-cache") == 0
    assert capsys.readouterr().out == cached.out
    assert command(str(run), "--prompt", "a", "--prompt", "b", "--samples", "2", "--quiet") == 0
    several = capsys.readouterr()
    assert several.out.count("--- 'a', sample ") == several.out.count("--- 'b', sample ") == 2
    assert several.err == ""


def test_json_has_one_object_a_text(run, capsys):
    assert command(str(run), "--prompt", "☃", "--samples", "2", "--max-new-tokens", "5", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [("☃", 0), ("☃", 1)]
    assert all(row["tokens"] <= 5 for row in rows)


def test_a_terminal_is_shown_control_characters_and_does_not_obey_them(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    _show("a\x1b[2Jb\n\tc\x9b")
    assert terminal.getvalue() == "a␛[2Jb\n\tc�"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-new-tokens", "-1"], "max_new_tokens is -1"),
        (["--samples", "0"], "samples is 0: ask for at least 1"),
        (["--temperature", "-2"], "temperature is -2.0"),
        (["--top-k", "0"], "top_k is 0"),
        (["--checkpoint", "77"], "there is no checkpoint '77'"),
        (["--backend", "nobody"], "'nobody': known: auto, "),
    ],
)
def test_bad_options_are_one_line(run, capsys, words, message):
    assert command(str(run), "--prompt", "the cat", *words) == 1
    out, error = capsys.readouterr()
    assert not out, "the prompt is written when there is something to follow it"
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert command(str(tmp_path)) == 1
    assert f"there is no run in {tmp_path}" in capsys.readouterr().err


def test_a_tokenizer_without_end_of_text_needs_a_prompt(trained, monkeypatch):
    monkeypatch.setattr(type(trained.tokenizer), "end_of_text_id", None)
    (one,) = next(complete(trained, ["the"], Sampling(7)))
    assert one.tokens == 7 and not one.stopped
    with pytest.raises(ValueError, match="no end-of-text token to begin a document with: pass a prompt"):
        next(complete(trained, [""], Sampling(7)))
