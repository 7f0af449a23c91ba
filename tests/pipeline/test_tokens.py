from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

import cs336_registry as registry
from cs336_registry.pipeline import corpus, tokenization, tokens
from cs336_registry.pipeline.errors import MismatchError, RunError
from cs336_registry.pipeline.progress import Progress
from cs336_registry.text import samples, tokenizer_folder
from cs336_registry.text.patterns import pattern_named

QUIET = Progress(quiet=True)


@pytest.fixture
def prepared(tiny, tmp_path):
    configuration = tiny()
    text = corpus.prepare(configuration.data, "<|endoftext|>", tmp_path, QUIET)
    return text, tokenization.prepare(configuration, text, tmp_path / "tokenizer", QUIET)


def encode(prepared, path, **options) -> tokens.Tokens:
    text, tokenizer = prepared
    return tokens.prepare(text.train, tokenizer, path, QUIET, backend="reference", **options)


def test_tokens_decode_to_the_text(prepared, tmp_path):
    text, tokenizer = prepared
    found = encode(prepared, tmp_path / "train.npy")
    assert found.ids.dtype == np.uint16
    assert isinstance(found.ids, np.memmap)
    assert tokenizer.tokenizer.decode(found.ids.tolist()) == text.train.path.read_text(encoding="utf-8")
    assert int((found.ids == tokenizer.end_of_text_id).sum()) == found.documents == text.train.documents
    token_bytes = np.array(tokenizer.token_bytes())
    separators = 2 * found.documents
    assert token_bytes[found.ids].sum() == found.bytes + separators


def test_parts_and_processes_give_the_same_tokens(prepared, tmp_path, monkeypatch):
    whole = encode(prepared, tmp_path / "whole.npy")
    monkeypatch.setattr(tokens, "PART_BYTES", 5000)
    assert len(list(tokens._ranges(prepared[0].train.path, b"<|endoftext|>"))) > 2
    parallel = encode(prepared, tmp_path / "parallel.npy", workers=2)
    assert np.array_equal(whole.ids, parallel.ids)
    assert not list(tmp_path.glob(".*parts*"))


def test_parts_end_behind_documents(prepared, monkeypatch):
    path = prepared[0].train.path
    content = path.read_bytes()
    for size in (1, 700, 5000, 10**6):
        monkeypatch.setattr(tokens, "PART_BYTES", size)
        ranges = list(tokens._ranges(path, b"<|endoftext|>"))
        assert ranges[0][0] == 0 and ranges[-1][1] == len(content)
        assert all(one[1] == other[0] for one, other in pairwise(ranges))
        assert all(content[:end].endswith(b"<|endoftext|>") for _, end in ranges[:-1])


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_a_long_document_is_cut_where_that_changes_nothing(tmp_path, monkeypatch, pattern):
    special_tokens = ["<|endoftext|>", "<|pad|>", " and "]
    content = samples.tricky(3000, seed=5).replace("<|endoftext|>", " and <|pad|>") + "<|endoftext|>the end"
    path = tmp_path / "text.txt"
    path.write_text(content, encoding="utf-8", newline="")
    vocab, merges = registry.get("bpe_trainer", backend="reference")(
        path, 400, special_tokens, pattern=pattern_named(pattern)
    )
    tokenizer_folder.write(tmp_path / "made", vocab, merges, pattern=pattern, special_tokens=special_tokens)
    tokenizer = tokenization.read(tmp_path / "made", "reference")
    monkeypatch.setattr(tokens, "PART_BYTES", 700)
    assert len(tokens._cuts(path, tokenizer)) > 5
    split = corpus.measure(path, "<|endoftext|>", QUIET)
    found = tokens.prepare(split, tokenizer, tmp_path / "text.npy", QUIET)
    assert found.ids.tolist() == tokenizer.tokenizer.encode(content)


def test_a_text_that_changes_before_it_is_encoded_is_refused(prepared, tmp_path):
    _, tokenizer = prepared
    path = tmp_path / "growing.txt"
    path.write_text("hello world " * 100)
    split = corpus.measure(path, tokenizer.end_of_text, QUIET)
    path.write_text("hello world " * 200)
    with pytest.raises(MismatchError, match=r"growing.txt changed after it was measured: run this again"):
        tokens.prepare(split, tokenizer, tmp_path / "ids.npy", QUIET)
    assert not list(tmp_path.glob("*ids*")), "neither ids nor parts of them are kept"


def test_parts_that_a_killed_run_left_behind_the_ids_are_removed(prepared, tmp_path, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tokens.shutil, "rmtree", killed)
        encode(prepared, tmp_path / "train.npy")
    assert list(tmp_path.glob(".*parts*"))
    encode(prepared, tmp_path / "train.npy")
    assert not list(tmp_path.glob(".*parts*"))


def test_an_interrupted_encoding_continues_with_the_missing_parts(prepared, tmp_path, monkeypatch):
    whole = encode(prepared, tmp_path / "whole.npy")
    monkeypatch.setattr(tokens, "PART_BYTES", 5000)
    real, done = tokens._encode_part, []

    def dies_in_the_third(tokenizer, source, start, *rest, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(start)
        return real(tokenizer, source, start, *rest, **options)

    monkeypatch.setattr(tokens, "_encode_part", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode(prepared, tmp_path / "again.npy")
    assert not (tmp_path / "again.npy").exists()
    resumed = []
    monkeypatch.setattr(tokens, "_encode_part", lambda *a, **o: resumed.append(a[2]) or real(*a, **o))
    assert np.array_equal(encode(prepared, tmp_path / "again.npy").ids, whole.ids)
    assert not set(done) & set(resumed)


def dies(*part):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_told_and_costs_its_part_alone(prepared, tmp_path, monkeypatch):
    whole = encode(prepared, tmp_path / "whole.npy")
    monkeypatch.setattr(tokens, "PART_BYTES", 5000)
    with monkeypatch.context() as killed:
        killed.setattr(tokens, "_encode_in_worker", dies)
        with pytest.raises(
            RunError, match=r"that encoded train.txt was killed .*: the parts that were complete are kept"
        ):
            encode(prepared, tmp_path / "again.npy", workers=2)
    assert not (tmp_path / "again.npy").exists()
    assert np.array_equal(encode(prepared, tmp_path / "again.npy").ids, whole.ids)


def test_an_error_is_told_before_the_other_parts_are_encoded(prepared, tmp_path, monkeypatch):
    parts, ending = [], threading.Event()

    def fails_first(folder, backend, source, start, *rest):
        parts.append(start)
        if start == 0:
            raise OSError("no disk")
        ending.wait()

    class Pool(ThreadPoolExecutor):
        """One worker that stands still from the first part on, until the pool is shut down."""

        def __init__(self, *_):
            super().__init__(1)

        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ending.set()
            super().shutdown()

    monkeypatch.setattr(tokens, "PART_BYTES", 5000)
    monkeypatch.setattr(tokens, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(tokens, "_encode_in_worker", fails_first)
    with pytest.raises(OSError, match="no disk"):
        encode(prepared, tmp_path / "train.npy", workers=2)
    assert len(parts) <= 2


def test_a_tokenizer_without_metadata_encodes_in_this_process(prepared, tmp_path, monkeypatch):
    whole = encode(prepared, tmp_path / "whole.npy")
    (prepared[1].folder / "metadata.json").unlink()
    monkeypatch.setattr(tokens, "PART_BYTES", 5000)
    monkeypatch.setattr(tokens, "ProcessPoolExecutor", None)
    assert np.array_equal(encode(prepared, tmp_path / "again.npy", workers=2).ids, whole.ids)


def test_what_a_worker_can_not_read_is_its_error(prepared, tmp_path, monkeypatch):
    (prepared[1].folder / "merges.txt").unlink()
    monkeypatch.setattr(tokens, "PART_BYTES", 5000)
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        encode(prepared, tmp_path / "train.npy", workers=2)


def test_a_truncated_file_is_refused(prepared, tmp_path):
    path = tmp_path / "train.npy"
    encode(prepared, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(MismatchError, match=r"it is truncated; delete it and its \.json"):
        tokens.read(path)


def test_tokens_of_another_tokenizer_are_refused(prepared, tmp_path):
    path = tmp_path / "train.npy"
    encode(prepared, path)
    with pytest.raises(MismatchError, match=r"was encoded with tokenizer .* this run's is abc"):
        tokens.read(path, "abc")


def test_tokens_of_another_text_are_refused(prepared, tmp_path):
    path = tmp_path / "train.npy"
    encode(prepared, path)
    text, tokenizer = prepared
    with pytest.raises(MismatchError, match="holds the tokens of another text"):
        tokens.prepare(text.validation, tokenizer, path, QUIET)


def test_a_missing_or_damaged_record_is_refused(prepared, tmp_path):
    path = tmp_path / "train.npy"
    encode(prepared, path)
    for content in ("{", json.dumps({"format": "other"}), json.dumps([{"text": "hello"}])):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(MismatchError, match=r"is not a record of tokens .*: choose another --out"):
            tokens.read(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="can't be trusted without it"):
        tokens.read(path)


def test_a_changed_tokenizer_is_refused(prepared):
    _, tokenizer = prepared
    merges = tokenizer.folder / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines(keepends=True)
    merges.write_text("".join([lines[0], lines[2], lines[1], *lines[3:]]), encoding="utf-8")
    with pytest.raises(MismatchError, match="the files were changed or mixed"):
        tokenization.read(tokenizer.folder, "reference")


def test_another_tokenizer_in_the_folder_is_refused(prepared, tiny):
    text, tokenizer = prepared
    with pytest.raises(MismatchError, match="holds a tokenizer with vocab_size = 280, this run wants 300"):
        tokenization.prepare(tiny("model.vocab_size=300"), text, tokenizer.folder, QUIET)


def test_a_tokenizer_made_elsewhere_is_adopted_if_it_fits(prepared, tiny, tmp_path):
    text, tokenizer = prepared
    adopted = tokenization.prepare(tiny(f"tokenizer.path={tokenizer.folder}"), text, tmp_path / "unused", QUIET)
    assert adopted.fingerprint == tokenizer.fingerprint
    assert not (tmp_path / "unused").exists()
    with pytest.raises(MismatchError, match=r"has ids up to 279 and model.vocab_size is 270"):
        tokenization.prepare(tiny(f"tokenizer.path={tokenizer.folder}", "model.vocab_size=270"), text, tmp_path, QUIET)
    (tokenizer.folder / "metadata.json").unlink()
    bare = tokenization.prepare(tiny(f"tokenizer.path={tokenizer.folder}"), text, tmp_path / "unused", QUIET)
    assert bare.fingerprint == tokenizer.fingerprint
