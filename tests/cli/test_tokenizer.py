"""`cs336 tokenizer`: from text to a folder, to ids and back, to other libraries' files and back."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cs336_reference.bpe_trainer import bpe_trainer
from cs336_reference.pretoken_counter import pretoken_counter
from cs336_reference.tokenizer import Tokenizer

from cs336_registry.pipeline import tokenization
from cs336_registry.text import formats, inspection, samples, tokenizer_folder
from cs336_registry.text.patterns import CL100K_PATTERN, GPT2_PATTERN
from tests.corpora import SPECIAL_TOKENS, english, vocabulary

from .typing_commands import typed

SPECIAL = [word for token in SPECIAL_TOKENS for word in ("--special-token", token)]
LIBRARIES = {"gpt2": "tokenizers", "hf": "tokenizers", "tiktoken": "tiktoken"}
OUTPUTS = {"gpt2": "gpt2_files", "hf": "tokenizer.json", "tiktoken": "ranks.tiktoken"}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return partial(typed, capsys)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(english(40_000) + samples.tricky(1500), encoding="utf-8", newline="")
    return path


@pytest.fixture
def folder(tmp_path):
    """A tokenizer folder of 600 tokens with GPT-2's pattern."""
    return stored_folder(tmp_path / "tokenizer", GPT2_PATTERN)


def stored_folder(path, pattern, special_tokens=tuple(SPECIAL_TOKENS)):
    vocab, merges = vocabulary(pattern)
    tokenizer_folder.write(path, vocab, merges, pattern=pattern, special_tokens=special_tokens)
    return path


def tokenizer_in(folder) -> Tokenizer:
    stored = tokenizer_folder.read(folder)
    return Tokenizer(stored.vocab, stored.merges, stored.special_tokens, pattern=stored.pattern)


# Training


@pytest.mark.parametrize("backend", ["heap_bpe", "numba_bpe", "reference"])
def test_training_keeps_what_the_reference_learns(run, corpus, backend):
    words = ("--vocab-size", 500, *SPECIAL, "--backend", backend, "--pattern", "cl100k", "--out", "made")
    assert run("tokenizer", "train", corpus, *words).code == 0
    stored = tokenizer_folder.read("made")
    assert (stored.vocab, stored.merges) == bpe_trainer(corpus, 500, SPECIAL_TOKENS, pattern=CL100K_PATTERN)
    assert stored.pattern == CL100K_PATTERN
    assert stored.special_tokens == tuple(SPECIAL_TOKENS)
    assert stored.metadata["tie_break"] == "greatest_bytes"
    assert stored.metadata["decisions"]["bpe_trainer"]["backend"] == backend


@pytest.mark.parametrize("source", ["text", "counts"])
def test_what_training_counted_seeds_the_encoder(run, corpus, source, monkeypatch):
    """The folder has the pretokens that came up more than once with their ids; `tokenizer encode` begins with them."""
    monkeypatch.setattr("cs336_numba_bpe.corpus.WARM_BYTES", 0)
    monkeypatch.setattr("cs336_numba_bpe.corpus.COLD_BYTES", 0)
    counts = pretoken_counter(corpus, SPECIAL_TOKENS)
    given = [corpus, *SPECIAL]
    if source == "counts":
        assert run("counts", "build", corpus, *SPECIAL, "--backend", "heap_bpe", "--out", "counts.bin").code == 0
        given = ["--from-counts", "counts.bin"]
    words = ("--vocab-size", 500, "--backend", "numba_bpe", "--out", "made")
    assert run("tokenizer", "train", *given, *words).code == 0
    built = tokenization.read(Path("made"), "numba_bpe").tokenizer
    assert len(built._encoder_vocab.known) == sum(count > 1 for count in counts.values())
    assert (
        run("tokenizer", "encode", corpus, "--tokenizer", "made", "--backend", "numba_bpe", "--out", "ids.npy").code
        == 0
    )
    text = corpus.read_bytes().decode("utf-8", "replace")
    assert np.load("ids.npy").tolist() == tokenizer_in("made").encode(text)


def test_training_says_how_far_it_is(run, corpus):
    result = run("tokenizer", "train", corpus, "--vocab-size", 400, "--backend", "heap_bpe", "--out", "made")
    assert "training 400 tokens on 1 file" in result.err
    assert "merging: 144 merges in" in result.err and "merges/s" in result.err
    assert "wrote made: 400 tokens, 144 merges" in result.err
    quiet = run("tokenizer", "train", corpus, "--vocab-size", 400, "--quiet", "--out", "made_quietly")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")


def test_inputs_of_every_kind_train_alike(run, corpus, tmp_path, monkeypatch):
    text = corpus.read_bytes()
    packed = tmp_path / "packed" / "corpus.txt.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(text))
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": text.decode()}), encoding="utf-8")
    for number, given in enumerate(("corpus.txt", "packed", "*.jsonl", "-")):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
        words = ("--vocab-size", 400, "--backend", "heap_bpe", "--out", f"made_{number}")
        assert run("tokenizer", "train", given, *words).code == 0, given
        assert tokenizer_folder.read(f"made_{number}").merges == tokenizer_folder.read("made_0").merges, given


def test_training_again_finds_the_same_and_refuses_another(run, corpus):
    words = ("tokenizer", "train", corpus, "--backend", "heap_bpe", "--out", "made")
    assert run(*words, "--vocab-size", 400).code == 0
    assert "holds this tokenizer already" in run(*words, "--vocab-size", 400).err
    assert run(*words, "--vocab-size", 401).failed_with("made holds a tokenizer with vocab_size = 400", "delete made")
    corpus.write_text("another text", encoding="utf-8")
    assert run(*words, "--vocab-size", 400).failed_with("made holds a tokenizer with corpus =")


@pytest.mark.slow
def test_a_killed_training_continues(run, corpus, tmp_path):
    corpus.write_text(english(300_000), encoding="utf-8", newline="")
    # One thing is slowed down, so that the process is surely killed between two checkpoints.
    code = (
        "import sys, time; from cs336_registry.text import training_cache as t; keep = t.TrainingCache.save_checkpoint;"
        "t.TrainingCache.save_checkpoint = lambda *a: (keep(*a), time.sleep(0.5));"
        "from cs336_registry.cli import main; main(sys.argv[1:])"
    )
    words = ["tokenizer", "train", str(corpus), "--vocab-size", "1000", "--checkpoint-every", "100", "--out", "made"]
    words += ["--backend", "heap_bpe", "--cache-dir", "kept"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("kept/*/merges_[2-5]00_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    kept = [path.name for path in tmp_path.glob("kept/*/merges_*")]
    assert kept
    assert run(*words).code == 0
    assert tokenizer_folder.read("made").merges == bpe_trainer(corpus, 1000)[1]
    assert run(*words[:-5], "again", *words[-4:], "--no-resume").code == 0
    assert tokenizer_folder.read("again").merges == tokenizer_folder.read("made").merges


@pytest.mark.parametrize("backend", ["heap_bpe", "numba_bpe", "reference"])
def test_training_from_counts_is_training_from_text(run, corpus, backend):
    build = ("counts", "build", corpus, *SPECIAL, "--backend", "heap_bpe", "--out", "counts.bin")
    assert run(*build).code == 0
    words = ("--vocab-size", 450, "--backend", backend, "--out", "made")
    assert run("tokenizer", "train", "--from-counts", "counts.bin", *words).code == 0
    stored = tokenizer_folder.read("made")
    assert (stored.vocab, stored.merges) == bpe_trainer(corpus, 450, SPECIAL_TOKENS)
    run("tokenizer", "train", corpus, *SPECIAL, "--vocab-size", 450, "--backend", "heap_bpe", "--out", "text")
    assert tokenizer_folder.read("text").metadata["corpus"] == stored.metadata["corpus"]
    other = run("tokenizer", "train", "--from-counts", "counts.bin", "--special-token", "x", *words[:-1], "other")
    assert other.failed_with("--special-token is ['x']", "was counted with")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vocab-size", 300), "name text files to train on, or --from-counts FILE"),
        (("corpus.txt", "--from-counts", "c.bin", "--vocab-size", 300), "and not both"),
        (("--from-counts", "c.bin", "--pattern", "gpt2", "--vocab-size", 300), "--pattern gpt2 goes with text"),
        (("--from-counts", "missing.bin", "--vocab-size", 300), "no file missing.bin"),
        (("missing.txt", "--vocab-size", 300), "no file 'missing.txt'"),
        (("corpus.txt", "--vocab-size", 25), "vocab_size is 25: it must be at least 256"),
        (("corpus.txt", "--vocab-size", 300, "--pattern", "(a"), "is not a regular expression"),
        (("corpus.txt", "--vocab-size", 300, "--special-token", ""), "special_tokens[0] is ''"),
        (("corpus.txt", "--vocab-size", 300, "--checkpoint-every", 0), "--checkpoint-every is 0"),
        (("corpus.txt", "--vocab-size", 300, "--max-ram", "lots"), "max_ram is 'lots'"),
        (("corpus.txt", "--vocab-size", 300, "--backend", "heap_bpe", "--max-ram", "9MB"), "pass max_ram="),
        (("corpus.txt", "--vocab-size", 300, "--num-workers", 0), "--num-workers is 0: it must be at least 1"),
        (("empty.txt", "--vocab-size", 300), "'empty.txt' holds no text besides special tokens"),
        (("corpus.txt", "--vocab-size", 300, "--backend", "nothing"), "'nothing': known: auto"),
    ],
    ids=[
        *("no_input", "both_inputs", "pattern_of_counts", "no_counts", "no_text", "vocab_size", "pattern"),
        *("special_token", "checkpoint_every", "max_ram", "too_little_ram", "num_workers", "empty", "backend"),
    ],
)
def test_bad_training_arguments_are_named(run, corpus, tmp_path, words, message):
    (tmp_path / "empty.txt").touch()
    assert run("tokenizer", "train", *words, "--out", "made").failed_with(message)
    assert not (tmp_path / "made").exists()


def test_a_file_is_no_folder_for_a_tokenizer(run, corpus):
    result = run("tokenizer", "train", corpus, "--vocab-size", 300, "--out", "corpus.txt")
    assert result.failed_with("--out is corpus.txt, which is a file: name a folder")
    assert corpus.read_text(encoding="utf-8").startswith(english(1000))


def test_a_full_disk_loses_nothing(run, corpus, tmp_path, monkeypatch):
    words = ("tokenizer", "train", corpus, "--vocab-size", 600, "--backend", "heap_bpe", "--checkpoint-every", 100)
    real, calls = os.fsync, []

    def full_after_a_while(descriptor):
        calls.append(descriptor)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full_after_a_while)
        result = run(*words, "--out", "made")
    assert result.failed_with("the disk is full while made is made", "free some space and run the same command again")
    assert not tokenizer_folder.is_there("made")
    assert list(tmp_path.glob("data/cache/*/word_counts_*")), "what was complete before the disk was full is kept"
    assert not list(tmp_path.rglob("*.tmp"))
    assert run(*words, "--out", "made").code == 0
    assert tokenizer_folder.read("made").merges == bpe_trainer(corpus, 600)[1]


# Ids and text


@pytest.mark.parametrize("workers", [1, 2])
def test_encode_and_decode(run, corpus, folder, tmp_path, monkeypatch, workers):
    from cs336_registry.pipeline import tokens

    monkeypatch.setattr(tokens, "PART_BYTES", 20_000)
    words = ("--tokenizer", folder, "--backend", "reference", "--num-workers", workers)
    assert run("tokenizer", "encode", corpus, *words, "--out", "corpus.npy").code == 0
    ids = np.load("corpus.npy", mmap_mode="r")
    assert ids.dtype == np.uint16
    text = corpus.read_bytes().decode()
    assert ids.tolist() == tokenizer_in(folder).encode(text)
    assert run("tokenizer", "decode", "corpus.npy", "--tokenizer", folder, "--out", "text.txt").code == 0
    assert (tmp_path / "text.txt").read_bytes() == corpus.read_bytes()
    assert run("tokenizer", "decode", "corpus.npy", "--tokenizer", folder).out == text


def test_a_fallback_is_told_in_one_line_whatever_the_number_of_processes(corpus, folder, tmp_path):
    code = (
        "from cs336_registry.pipeline import tokens; tokens.PART_BYTES = 20_000;"
        "import sys; from cs336_registry.cli import main; main(sys.argv[1:])"
    )
    words = ["tokenizer", "encode", str(corpus), "--tokenizer", str(folder), "--out", "corpus.npy", "--quiet"]
    words += ["--backend", "torch", "--num-workers", "2"]
    finished = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0 and finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("warning: tokenizer: torch was preferred (it does not provide tokenizer), ref")


def test_one_process_for_each_processor_that_may_be_used(run, corpus, folder, monkeypatch):
    from cs336_registry.machine import detect
    from cs336_registry.pipeline import tokens

    asked, prepare = [], tokens.prepare
    monkeypatch.setattr(tokens, "prepare", lambda *a, workers, **o: asked.append(workers) or prepare(*a, **o))
    monkeypatch.setattr(os, "cpu_count", lambda: 999)
    words = ("--tokenizer", folder, "--backend", "reference", "--out", "corpus.npy")
    assert run("tokenizer", "encode", corpus, *words).code == 0
    assert asked == [detect().cpu_count]


def test_a_text_is_no_place_for_the_result(run, folder, tmp_path):
    (tmp_path / "corpus.json").write_text('[{"text": "hello"}]')
    words = ("--tokenizer", folder, "--backend", "reference", "--out", "corpus.npy")
    result = run("tokenizer", "encode", "corpus.json", *words)
    assert result.failed_with("corpus.json is one of the inputs", "choose another --out")
    (tmp_path / "other.txt").write_text("hello")
    result = run("tokenizer", "encode", "other.txt", *words)
    assert result.failed_with("corpus.json is not a record of tokens", "choose another --out")
    assert run("tokenizer", "encode", "other.txt", *words[:-1], "ids.npy").code == 0
    result = run("tokenizer", "decode", "ids.npy", "--tokenizer", folder, "--out", "ids.npy")
    assert result.failed_with("ids.npy is one of the inputs", "choose another --out")
    assert run("tokenizer", "decode", "ids.npy", "--tokenizer", folder).out == "hello"


def test_several_texts_are_told_apart(run, corpus, folder, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    words = ("tokenizer", "encode", "lines.jsonl", corpus, "--tokenizer", folder, "--backend", "heap_bpe")
    assert run(*words, "--out", "all.npy").code == 0
    text = f"one{SPECIAL_TOKENS[0]}two{SPECIAL_TOKENS[0]}" + corpus.read_bytes().decode()
    assert np.load("all.npy").tolist() == tokenizer_in(folder).encode(text)
    assert not list(tmp_path.glob(".all*")), "what was written on the way is gone"


@pytest.mark.parametrize("backend", ["reference", "numba_bpe"])
def test_malformed_bytes_are_told_once_a_file(run, folder, tmp_path, monkeypatch, backend):
    malformed = "Grüße aus Köln\n".encode("latin-1") * 3
    (tmp_path / "latin.txt").write_bytes(malformed)
    (tmp_path / "latin.txt.gz").write_bytes(gzip.compress(malformed))
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "' + malformed[:-1].replace(b"\n", b" ") + b'"}\n')
    (tmp_path / "sound.txt").write_text("Grüße, and a \ufffd of its own", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(malformed)))

    def warnings(*inputs, **options):
        words = (*inputs, "--tokenizer", folder, "--backend", backend, "--out", f"{len(list(tmp_path.iterdir()))}.npy")
        lines = run("tokenizer", "encode", *words, *options.get("more", ())).err.splitlines()
        return [line.partition(" malformed")[0] for line in lines if line.startswith("warning")]

    def told(name):
        return f"warning: {name} is not UTF-8 everywhere: 9"

    assert warnings("latin.txt") == [told("latin.txt")]
    assert warnings("-") == [told("standard input")]
    several = ["latin.txt.gz", "lines.jsonl", "latin.txt"]
    assert warnings(*several, "sound.txt") == list(map(told, several))
    assert warnings("sound.txt") == warnings("latin.txt", more=["--quiet"]) == []


@pytest.mark.parametrize("backend", ["reference", "heap_bpe", "numba_bpe"])
def test_training_tells_malformed_bytes_once_a_file(run, tmp_path, backend):
    malformed = "Grüße aus Köln\n".encode("latin-1") * 3
    (tmp_path / "latin.txt").write_bytes(malformed)
    (tmp_path / "latin.txt.gz").write_bytes(gzip.compress(malformed))
    (tmp_path / "sound.txt").write_text("Grüße, and a \ufffd of its own", encoding="utf-8")

    def told(*words):
        made = f"made_{len(list(tmp_path.iterdir()))}"
        words = ("--vocab-size", 270, "--backend", backend, "--out", made, *words)
        lines = run("tokenizer", "train", "latin.txt", "latin.txt.gz", "sound.txt", *words).err.splitlines()
        return [line.partition(" malformed")[0] for line in lines if line.startswith("warning")]

    expected = [f"warning: {name} is not UTF-8 everywhere: 9" for name in ("latin.txt", "latin.txt.gz")]
    assert told() == told() == expected
    assert told("--quiet") == []


def test_a_tokenizer_without_special_tokens_encodes_in_parts(run, corpus, tmp_path, monkeypatch):
    from cs336_registry.pipeline import tokens

    vocab, merges = bpe_trainer(corpus, 400)
    tokenizer_folder.write("plain", vocab, merges, pattern="gpt2", special_tokens=[])
    monkeypatch.setattr(tokens, "PART_BYTES", 9000)
    words = ("--tokenizer", "plain", "--backend", "heap_bpe", "--num-workers", 1)
    assert run("tokenizer", "encode", corpus, *words, "--out", "corpus.npy").code == 0
    assert np.load("corpus.npy").tolist() == Tokenizer(vocab, merges).encode(corpus.read_bytes().decode())
    result = run("tokenizer", "encode", corpus, corpus, *words, "--out", "twice.npy")
    assert result.failed_with("no special token to put between several texts")


def test_overlapping_special_tokens_are_not_cut(run, tmp_path, monkeypatch):
    from cs336_registry.pipeline import tokens

    special = ["<|end|>", "<|end|><|pad|>", "x<|"]
    text = "word x<|end|> word<|end|><|pad|> more, <|end|><|end|>!!! " * 300
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    vocab, merges = bpe_trainer("text.txt", 300, special)
    tokenizer_folder.write(tmp_path / "made", vocab, merges, pattern="gpt2", special_tokens=special)
    monkeypatch.setattr(tokens, "PART_BYTES", 701)
    words = ("--tokenizer", "made", "--backend", "reference", "--num-workers", 1, "--out", "text.npy")
    assert run("tokenizer", "encode", "text.txt", *words).code == 0
    assert np.load("text.npy").tolist() == Tokenizer(vocab, merges, special).encode(text)


def test_an_interrupted_encoding_continues(run, corpus, folder, tmp_path, monkeypatch):
    from cs336_registry.pipeline import tokens

    packed = tmp_path / "corpus.txt.gz"
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    monkeypatch.setattr(tokens, "PART_BYTES", 3000)
    words = ("tokenizer", "encode", packed, "--tokenizer", folder, "--backend", "reference", "--num-workers", 1)
    real, done = tokens._encode_part, []

    def until_the_disk_is_full(tokenizer, source, start, *rest, **options):
        if len(done) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(start)
        return real(tokenizer, source, start, *rest, **options)

    monkeypatch.setattr(tokens, "_encode_part", until_the_disk_is_full)
    assert run(*words, "--out", "all.npy").failed_with("the disk is full while all.npy is made")
    assert not list(tmp_path.glob(".all.text*"))
    resumed = []
    monkeypatch.setattr(tokens, "_encode_part", lambda *a, **o: resumed.append(a[2]) or real(*a, **o))
    assert run(*words, "--out", "all.npy").code == 0
    assert resumed and not set(resumed) & set(done)
    assert np.load("all.npy").tolist() == tokenizer_in(folder).encode(corpus.read_bytes().decode())


def test_the_text_that_is_written_out_goes_whatever_happens(run, folder, tmp_path, monkeypatch):
    from cs336_registry.pipeline import tokens

    monkeypatch.setattr(tokens, "_encode_part", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text"))
    words = ("--tokenizer", folder, "--backend", "reference", "--out", tmp_path / "a.npy")
    assert run("tokenizer", "encode", tmp_path / "a.txt.gz", *words).code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list(tmp_path.glob(".a.text*"))
    (tmp_path / ".a.text.tmp").write_text("what a run left that was killed at once")
    assert run("tokenizer", "encode", tmp_path / ".a.text.tmp", *words).failed_with("is one of the inputs")
    monkeypatch.undo()
    assert run("tokenizer", "encode", tmp_path / "a.txt.gz", *words).code == 0
    assert not list(tmp_path.glob(".a.text*"))


def test_messages_name_the_file_that_was_given(run, folder, tmp_path):
    (tmp_path / "none.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "some.txt.gz").write_bytes(gzip.compress(b"some text"))
    words = ("--tokenizer", folder, "--backend", "reference", "--out", "all.npy")
    assert run("tokenizer", "encode", "none.txt.gz", *words).failed_with("error: none.txt.gz is empty")
    result = run("tokenizer", "encode", "some.txt.gz", "none.txt.gz", *words)
    assert "encoding some.txt.gz and 1 more: " in result.err and ".all" not in result.err
    result = run("tokenizer", "encode", "some.txt.gz", *words)
    assert result.failed_with("all.npy holds the tokens of another text than some.txt.gz")


@pytest.mark.slow
def test_workers_end_with_the_process_that_was_killed(run, corpus, folder, tmp_path):
    psutil = pytest.importorskip("psutil", reason="needs the development group")
    corpus.write_text(english(4_000_000), encoding="utf-8", newline="")
    code = (
        "from cs336_registry.pipeline import tokens; tokens.PART_BYTES = 1_000_000;"
        "import sys; from cs336_registry.cli import main; main(sys.argv[1:])"
    )
    words = ["tokenizer", "encode", str(corpus), "--tokenizer", str(folder), "--out", "corpus.npy", "--quiet"]
    words += ["--backend", "reference", "--num-workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(workers := psutil.Process(process.pid).children()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(3)  # the workers are up and encoding
    assert len(workers) == 3, "the resource tracker and two workers"
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert (len(gone), alive) == (3, [])
    assert not (tmp_path / "corpus.npy").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="process groups are posix")
def test_ctrl_c_ends_the_processes_without_a_word_of_theirs(corpus, folder, tmp_path):
    corpus.write_text(english(2_000_000), encoding="utf-8", newline="")
    code = (
        # Whoever started the tests in the background has Ctrl-C ignored, and what they start inherits that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from cs336_registry.pipeline import tokens; tokens.PART_BYTES = 50_000;"
        "import sys; from cs336_registry.cli import main; main(sys.argv[1:])"
    )
    words = ["tokenizer", "encode", str(corpus), "--tokenizer", str(folder), "--out", "corpus.npy", "--quiet"]
    words += ["--backend", "reference", "--num-workers", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while process.poll() is None and len(list(tmp_path.glob(".*/.*.tmp"))) < 2:  # both write a part
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (tmp_path / "corpus.npy").exists()


def test_bad_ids_are_named(run, folder, tmp_path, monkeypatch):
    np.save(tmp_path / "large.npy", np.array([1, 99_999]))
    np.save(tmp_path / "floats.npy", np.array([1.5]))
    words = ("--tokenizer", folder)
    assert run("tokenizer", "decode", "large.npy", *words).failed_with("no token with id 99999")
    assert run("tokenizer", "decode", "no.npy", *words).failed_with("no file no.npy: pass a .npy file of cs336")
    (tmp_path / "text.npy").write_text("not an array")
    assert run("tokenizer", "decode", "text.npy", *words).failed_with("text.npy is not a .npy file of token ids: pass")
    assert run("tokenizer", "decode", "floats.npy", *words).failed_with("1-D float64: expected one dimension of whole")
    monkeypatch.setattr(sys, "stdin", io.StringIO("[72, 2]\nx"))
    assert run("tokenizer", "decode", "-", *words).failed_with("'x' is no token id")
    monkeypatch.setattr(sys, "stdin", io.StringIO(" ".join(map(str, tokenizer_in(folder).encode("héllo 日本")))))
    assert run("tokenizer", "decode", "-", *words).out == "héllo 日本"
    assert run("tokenizer", "encode", "x.txt", *words, "--out", "x.bin").failed_with("go to a .npy file, such as x.npy")


# Other libraries' files


@pytest.mark.parametrize("name", sorted(LIBRARIES))
def test_what_is_exported_comes_back(run, folder, name):
    pytest.importorskip(LIBRARIES[name], reason="needs the extra export")
    result = run("tokenizer", "export", folder, "--format", name, "--out", OUTPUTS[name])
    assert result.code == 0, result.err
    assert f"the same ids as {LIBRARIES[name]}" in result.err
    words = ("--format", name, "--out", "back", *(SPECIAL if name == "gpt2" else ()))
    result = run("tokenizer", "import", OUTPUTS[name], *words)
    assert result.code == 0, result.err
    assert tokenizer_folder.read("back").fingerprint == tokenizer_folder.read(folder).fingerprint


@pytest.mark.parametrize("name", ["hf", "tiktoken"])
@pytest.mark.parametrize("pattern", [CL100K_PATTERN, r"\p{L}+|[^\p{L}]"], ids=["cl100k", "own"])
def test_other_patterns_are_kept(run, tmp_path, name, pattern):
    pytest.importorskip(LIBRARIES[name], reason="needs the extra export")
    folder = stored_folder(tmp_path / "made", pattern)
    assert run("tokenizer", "export", folder, "--format", name, "--out", OUTPUTS[name]).code == 0
    assert run("tokenizer", "import", OUTPUTS[name], "--format", name, "--out", "back").code == 0
    assert tokenizer_folder.read("back").pattern == pattern
    result = run("tokenizer", "export", folder, "--format", "gpt2", "--out", "files")
    assert result.failed_with("are read with GPT-2's pattern", "export to hf or tiktoken")


def test_the_libraries_read_the_files_by_their_own_ways(run, folder):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra export")
    run("tokenizer", "export", folder, "--format", "hf", "--out", "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file("tokenizer.json")
    for seed in range(5):
        text = samples.tricky(200, seed=100 + seed)
        ids = theirs.encode(text).ids
        assert ids == tokenizer_in(folder).encode(text)
        assert theirs.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ["hf", "tiktoken"])
def test_an_export_that_the_library_reads_otherwise_is_not_kept(run, folder, tmp_path, monkeypatch, name):
    pytest.importorskip(LIBRARIES[name], reason="needs the extra export")
    module = formats.module(name)
    real = module.write

    def swapped(stored, path):
        """Two tokens change places in what is written."""
        vocab = {**stored.vocab, 400: stored.vocab[401], 401: stored.vocab[400]}
        return real(tokenizer_folder.StoredTokenizer(vocab, stored.merges, stored.metadata), path)

    monkeypatch.setattr(module, "write", swapped)
    result = run("tokenizer", "export", folder, "--format", name, "--out", "out.file")
    assert result.failed_with(f"{LIBRARIES[name]} reads the {name} export otherwise", "here and", "there")
    assert not (tmp_path / "out.file").exists()


def test_special_tokens_that_tiktoken_confuses_are_refused(run, tmp_path):
    special = [*SPECIAL_TOKENS, "<|endoftext|>2"]
    vocab, merges = vocabulary()
    vocab = {**vocab, len(vocab): special[-1].encode()}
    tokenizer_folder.write(tmp_path / "made", vocab, merges, pattern="gpt2", special_tokens=special)
    result = run("tokenizer", "export", "made", "--format", "tiktoken", "--out", "ranks")
    assert result.failed_with("special token '<|endoftext|>2' begins with '<|endoftext|>'", "export to hf")
    assert run("tokenizer", "export", "made", "--format", "hf", "--out", "tokenizer.json").code == 0


@pytest.mark.parametrize(
    "special_token", ["< a b >", "é日本", "\n\n", "the"], ids=["spaces", "unicode", "newlines", "word"]
)
@pytest.mark.parametrize("name", ["hf", "tiktoken"])
def test_unusual_special_tokens_are_exported_exactly(run, corpus, name, special_token):
    pytest.importorskip(LIBRARIES[name], reason="needs the extra export")
    vocab, merges = bpe_trainer(corpus, 350, [special_token])
    tokenizer_folder.write("made", vocab, merges, pattern="gpt2", special_tokens=[special_token])
    assert run("tokenizer", "export", "made", "--format", name, "--out", OUTPUTS[name]).code == 0
    assert run("tokenizer", "import", OUTPUTS[name], "--format", name, "--out", "back").code == 0
    assert tokenizer_folder.read("back").fingerprint == tokenizer_folder.read("made").fingerprint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_disk_that_is_full_for_the_library_is_an_error_of_the_system(folder):
    pytest.importorskip("tokenizers", reason="needs the extra export")
    with pytest.raises(OSError, match="No space left on device"):
        formats.module("hf").write(tokenizer_folder.read(folder), Path("/dev/full"))


def test_merges_are_recovered_from_ranks():
    from cs336_registry.text.formats.tiktoken_ranks import recovered_merges

    vocab, merges = vocabulary()
    special = {token.encode() for token in SPECIAL_TOKENS}
    assert recovered_merges({t: i for i, t in vocab.items() if t not in special}) == merges
    with pytest.raises(ValueError, match=r"token 9 \(b'abcd'\) can't be reached"):
        recovered_merges({b"a": 0, b"b": 1, b"c": 2, b"d": 3, b"abcd": 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "changes text before it encodes it"),
        ({"model": {"type": "Unigram"}}, "the model has type = 'Unigram'"),
        ({"model": {"byte_fallback": True}}, "the model has byte_fallback = True"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts text by Whitespace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "without a space put in front"),
        ({"added_tokens": [{"id": 0, "content": "<|x|>", "lstrip": True}]}, "takes the whitespace around it"),
    ],
    ids=["normalizer", "unigram", "fallback", "whitespace", "prefix_space", "lstrip"],
)
def test_files_that_would_encode_otherwise_are_not_imported(run, folder, tmp_path, change, message):
    pytest.importorskip("tokenizers", reason="needs the extra export")
    run("tokenizer", "export", folder, "--format", "hf", "--out", "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) and key == "model" else value
    (tmp_path / "changed.json").write_text(json.dumps(content), encoding="utf-8")
    assert run("tokenizer", "import", "changed.json", "--format", "hf", "--out", "x").failed_with(message)


def test_files_that_are_something_else_are_named(run, corpus, folder):
    assert run("tokenizer", "import", corpus, "--format", "hf", "--out", "x").failed_with(
        "corpus.txt is not a tokenizer.json: it is not JSON"
    )
    (corpus.parent / "other.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
    result = run("tokenizer", "import", "other.json", "--format", "hf", "--out", "x")
    assert result.failed_with("other.json is not a tokenizer.json of a byte-pair model: it has no model with merges")
    assert run("tokenizer", "import", corpus, "--format", "tiktoken", "--out", "x").failed_with("line 1 is")
    assert run("tokenizer", "import", "nothing", "--format", "gpt2", "--out", "x").failed_with("no file nothing/vocab")
    assert run("tokenizer", "import", "nothing", "--format", "hf", "--out", "x").failed_with("no file nothing")
    assert run("tokenizer", "import", corpus, "--format", "hf", "--out", folder).failed_with(
        "holds a tokenizer already"
    )
    assert run("tokenizer", "export", "nothing", "--format", "hf", "--out", "x").failed_with("no tokenizer in nothing")


def test_a_missing_library_is_named_with_its_cure(run, folder, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    result = run("tokenizer", "export", folder, "--format", "hf", "--out", "x")
    assert result.failed_with("exporting to hf needs the package tokenizers", "pip install 'cs336-registry[export]'")


# What a tokenizer folder is


def test_a_changed_folder_is_found_out(run, corpus, folder):
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges[5], merges[6] = merges[6], merges[5]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    result = run("tokenizer", "inspect", folder)
    assert result.failed_with("the files were changed or mixed")


def test_a_special_token_that_vocab_json_can_not_hold_is_refused(tmp_path):
    vocab, merges = bpe_trainer_of("text and text", ["Ġ"], tmp_path)
    with pytest.raises(ValueError, match=r"can't hold token|are both"):
        tokenizer_folder.write(tmp_path / "made", vocab, merges, pattern="gpt2", special_tokens=["Ġ"])
    assert not tokenizer_folder.is_there(tmp_path / "made")


def bpe_trainer_of(text, special_tokens, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return bpe_trainer(path, 260, special_tokens)


# Inspecting


def test_inspect_counts_what_it_says(run, corpus, folder):
    words = ("tokenizer", "inspect", folder, corpus, "--backend", "reference")
    report = json.loads(run(*words, "--json").out)
    text = corpus.read_bytes().decode()
    ids = tokenizer_in(folder).encode(text)
    (row,) = report["corpora"]
    assert (row["bytes"], row["tokens"], row["distinct_tokens"]) == (len(text.encode()), len(ids), len(set(ids)))
    assert row["bytes_per_token"] == pytest.approx(row["bytes"] / row["tokens"])
    assert row["hours_for_825_gb"] == pytest.approx(825e9 / (row["megabytes_per_second"] * 1e6) / 3600)
    vocab = tokenizer_folder.read(folder).vocab
    assert report["dead"]["count"] == len(
        [i for i, t in vocab.items() if i not in ids and t.decode(errors="replace") not in SPECIAL_TOKENS]
    )
    assert report["longest_bytes"] == max(
        len(t) for t in vocab.values() if t.decode("utf-8", "replace") not in SPECIAL_TOKENS
    )
    shown = run(*words).out
    assert "bytes per token" in shown and "hours for 825 GB" in shown
    sampled = json.loads(run(*words, "--sample", "10KB", "--json").out)["corpora"][0]
    assert 10_000 <= sampled["bytes"] < len(text.encode()) + 1
    assert run(*words, "--sample", "much").failed_with("'much' is no size")


def test_inspect_without_a_corpus_finds_tokens_that_never_come_up(run, tmp_path):
    vocab = {**{byte: bytes((byte,)) for byte in range(256)}, 256: b"ab", 257: b"bc", 258: b"abc", 259: b"zz"}
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    tokenizer_folder.write(tmp_path / "made", vocab, merges, pattern="gpt2", special_tokens=[])
    report = json.loads(run("tokenizer", "inspect", "made", "--json").out)
    assert (report["dead"]["count"], report["dead"]["examples"]) == (2, ["abc", "zz"])
    assert report["incomplete"]["count"] == 128


@pytest.mark.parametrize(
    ("text", "expected"),
    [("â€™", True), ("Ã©", True), ("\ufffd", True), ("é", False), ("naïve", False), ("日本", False), ("ascii", False)],
)
def test_mojibake(text, expected):
    assert inspection.is_mojibake(text) is expected


def test_warmup_says_what_it_did(run):
    pytest.importorskip("numba", reason="needs the extra numba")
    result = run("warmup")
    assert result.code == 0
    assert "numba_bpe: " in result.out and ("compiled" in result.out)
