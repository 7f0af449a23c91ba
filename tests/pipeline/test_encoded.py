"""Training on tokens that were encoded before: the same run as on their text, and refused where they do not fit."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from cs336_registry import cli
from cs336_registry.errors import ConfigurationError
from cs336_registry.pipeline import corpus, training
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.run_folder import RunFolder

from .conftest import TINY
from .test_training import losses

QUIET = Progress(quiet=True)
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def on_text(corpus_path, tmp_path_factory):
    from .conftest import load

    out = tmp_path_factory.mktemp("text") / "run"
    settings = [*TINY, f'data.train="{corpus_path}"', "data.validation_fraction=0.2", "training.steps=4"]
    training.train(load("quickstart", settings), out, progress=QUIET)
    return out


def typed(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    return int(stopped.value.code or 0)


def train(out, train, validation, tokenizer, *more) -> int:
    settings = [*TINY, "training.steps=4", f'data.train="{train}"', f'data.validation="{validation}"']
    settings += [f'tokenizer.path="{tokenizer}"', *more]
    return typed("train", "quickstart", *(word for one in settings for word in ("--set", one)), "--out", out, "--quiet")


def test_encoding_and_training_is_the_same_as_training_on_the_text(on_text, tmp_path, capsys):
    data = on_text / "data"
    for name, packed in (("train", False), ("validation", True)):
        source = data / f"{name}.txt"
        if packed:
            (tmp_path / "held.txt.gz").write_bytes(gzip.compress(source.read_bytes()))
            source = tmp_path / "held.txt.gz"
        words = ("--tokenizer", data / "tokenizer", "--out", tmp_path / f"{name}.npy", "--backend", "reference")
        assert typed("data", "encode", source, *words, "--num-workers", 1, "--quiet") == 0
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), np.load(data / f"{name}.npy"))
    sides = (tmp_path / "train.npy", tmp_path / "validation.npy")
    assert train(tmp_path / "run", *sides, data / "tokenizer") == 0, capsys.readouterr().err
    assert losses(tmp_path / "run") == losses(on_text)
    one, other = (RunFolder(out).record() for out in (tmp_path / "run", on_text))
    for side in ("train", "validation"):
        for fact in ("documents", "sha256"):
            assert one["corpus"][side][fact] == other["corpus"][side][fact]
    # Text written for a run stands between newlines that do not count; otherwise the baselines are the same.
    assert one["baselines"]["zlib"] == other["baselines"]["zlib"]
    assert one["baselines"]["unigram"] == pytest.approx(other["baselines"]["unigram"], rel=0.02)


def test_a_truncated_file_is_refused(on_text, tmp_path, capsys):
    data = on_text / "data"
    for name in ("train.npy", "train.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    content = (tmp_path / "train.npy").read_bytes()
    (tmp_path / "train.npy").write_bytes(content[:-100])
    assert train(tmp_path / "run", tmp_path / "train.npy", data / "validation.npy", data / "tokenizer") == 1
    told = capsys.readouterr().err
    assert "train.npy has" in told and "it is truncated; delete it and its .json to encode it again" in told


def test_tokens_of_another_tokenizer_are_refused(on_text, corpus_path, tmp_path, capsys):
    data = on_text / "data"
    words = ("--vocab-size", 270, "--special-token", END, "--out", tmp_path / "other", "--backend", "reference")
    assert typed("tokenizer", "train", corpus_path, *words, "--quiet") == 0
    assert train(tmp_path / "run", data / "train.npy", data / "validation.npy", tmp_path / "other") == 1
    assert "was encoded with tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["data.train=a.npy", "tokenizer.path=c"],
            r"train = 'a.npy', validation = None: tokens are taken for both or for neither",
        ),
        (
            ["data.train=a.npy", "data.validation=b.txt", "tokenizer.path=c"],
            "for both or for neither; cs336 data encode makes",
        ),
        (["data.train=a.npy", "data.validation=b.npy"], "name their tokenizer's folder in tokenizer.path"),
        (
            ["data.train=a.npy", "data.validation=b.npy", "tokenizer.path=c", "data.maximum_bytes=5"],
            "maximum_bytes = 5 cuts text",
        ),
    ],
)
def test_half_a_configuration_is_refused(settings, told):
    from .conftest import load

    with pytest.raises(ConfigurationError, match=told):
        load("quickstart", settings)


@pytest.mark.parametrize(
    ("text", "documents"),
    [("a", 1), (f"a{END}", 1), (f"a{END}\n", 1), (f"a{END}b", 2), (f"a{END}b{END}", 2), (f"a{END}" * 5 + "b", 6)],
)
@pytest.mark.parametrize("size", [1, 3, 1 << 22])
def test_documents_are_counted_however_the_file_is_read(tmp_path, monkeypatch, text, documents, size):
    path = tmp_path / "text.txt"
    path.write_text(text)
    monkeypatch.setattr(corpus, "READ_BYTES", size)
    found = corpus.measure(path, END, QUIET)
    assert (found.documents, found.bytes) == (documents, len(text.replace(END, "")))
