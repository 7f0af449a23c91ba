from __future__ import annotations

import gzip
import io
import os
import threading

import pytest

from cs336_registry.pipeline import corpus, run_data
from cs336_registry.pipeline.configuration import DataConfiguration
from cs336_registry.pipeline.errors import MismatchError
from cs336_registry.pipeline.progress import Progress
from cs336_registry.text.inputs import BLOCK_SIZE

from .conftest import TINY, load

END = "<|endoftext|>"
QUIET = Progress(quiet=True)


def prepare(folder, **settings) -> corpus.Corpus:
    return corpus.prepare(DataConfiguration(**settings), END, folder, QUIET)


def documents(split: corpus.Split) -> list[str]:
    return [part.strip("\n") for part in split.path.read_text(encoding="utf-8").split(END) if part.strip("\n")]


def test_documents_go_to_one_side_whole(corpus_path, tmp_path):
    found = prepare(tmp_path, train=str(corpus_path), validation_fraction=0.2)
    original = corpus_path.read_text(encoding="utf-8").split(f"\n{END}\n")
    train, held = documents(found.train), documents(found.validation)
    assert sorted(train + held) == sorted(original)
    assert 1 <= len(held) <= 20
    assert (found.train.documents, found.validation.documents) == (len(train), len(held))
    assert found.train.bytes == sum(len(document.encode()) for document in train)


def test_equal_documents_stay_on_one_side(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(END.join(["the same\n", *(f"number {n}\n" for n in range(50))] * 3))
    found = prepare(tmp_path / "data", train=str(text), validation_fraction=0.3)
    assert not set(documents(found.train)) & set(documents(found.validation))


def test_a_token_cut_by_blocks_is_still_found():
    blocks = ["ab<|endof", "text|>", "c<|end", "x<|endoftext|><|endoftext|>\nd", "e"]
    assert list(corpus._split(iter(blocks), END)) == ["ab", "c<|endx", "de"]


def test_a_single_document_is_cut_at_a_line(tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("".join(f"line {n}\n" for n in range(100)))
    found = prepare(tmp_path / "data", train=str(text), validation_fraction=0.1)
    (train,), (held,) = documents(found.train), documents(found.validation)
    assert f"{train}\n{held}\n" == text.read_text()
    assert 5 <= held.count("\n") <= 15


def test_two_plain_files_are_used_where_they_are(corpus_path, tmp_path):
    other = tmp_path / "valid.txt"
    other.write_text(f"one\n{END}\ntwo\n{END}\n")
    found = prepare(tmp_path / "data", train=str(corpus_path), validation=str(other))
    assert (found.train.path, found.validation.path) == (corpus_path, other)
    assert (found.validation.documents, found.validation.bytes) == (2, other.stat().st_size - 2 * len(END))
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["corpus.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are posix")
def test_two_pipes_are_kept_because_they_are_read_once(tmp_path):
    for name in ("train", "validation"):
        os.mkfifo(tmp_path / name)
        threading.Thread(target=(tmp_path / name).write_text, args=(f"one\n{END}\ntwo",), daemon=True).start()
    found = prepare(tmp_path / "data", train=str(tmp_path / "train"), validation=str(tmp_path / "validation"))
    assert found.train.path.parent == found.validation.path.parent == tmp_path / "data"
    assert documents(found.train) == documents(found.validation) == ["one", "two"]


def test_compressed_text_is_read(corpus_path, tmp_path):
    packed = tmp_path / "text.txt.gz"
    packed.write_bytes(gzip.compress(corpus_path.read_bytes()))
    plain = prepare(tmp_path / "plain", train=str(corpus_path))
    assert prepare(tmp_path / "packed", train=str(packed)).train.sha256 == plain.train.sha256


def test_maximum_bytes_limits_what_is_read(corpus_path, tmp_path):
    found = prepare(tmp_path, train=str(corpus_path), maximum_bytes=3000, validation_fraction=0.3)
    assert 3000 <= found.train.bytes + found.validation.bytes < 4500


@pytest.mark.parametrize("apart", [False, True], ids=["split", "as_it_is"])
def test_malformed_bytes_are_told_when_the_data_is_made(tmp_path, apart):
    malformed, sound = tmp_path / "latin.txt", tmp_path / "sound.txt"
    malformed.write_bytes(END.encode().join(f"Köln {n}\n".encode("latin-1") for n in range(50)))
    sound.write_text(f"Köln\n{END}\na \ufffd of its own", encoding="utf-8")
    inputs = [f'data.train="{malformed}"', f'data.validation="{sound}"']
    configuration = load("quickstart", [*TINY, *(inputs if apart else [f'data.train=["{malformed}", "{sound}"]'])])
    for told in ([f"warning: {malformed} is not UTF-8 everywhere: 50 malformed sequences of bytes"], []):
        stream = io.StringIO()
        run_data.prepare(configuration, tmp_path / "data", Progress(stream))
        warnings = [line for line in stream.getvalue().splitlines() if line.startswith("warning")]
        assert [line.partition(" were")[0] for line in warnings] == told


@pytest.mark.parametrize("validation", ["text.txt", "other.txt"])
def test_a_limit_that_cuts_a_character_is_no_malformed_text(tmp_path, validation):
    text, stream = tmp_path / "text.txt", io.StringIO()
    (tmp_path / "other.txt").write_text("other")
    text.write_text("a" * 100 + END + "ü" * BLOCK_SIZE, encoding="utf-8")  # the first block ends within a character
    data = DataConfiguration(train=str(text), validation=str(tmp_path / validation), maximum_bytes=100)
    found = corpus.prepare(data, END, tmp_path / "data", Progress(stream))
    assert found.train.bytes == 100
    assert "warning" not in stream.getvalue()


def test_another_corpus_in_the_folder_is_refused(corpus_path, tmp_path):
    prepare(tmp_path, train=str(corpus_path))
    before = (tmp_path / "train.txt").read_bytes()
    with pytest.raises(MismatchError, match="holds another corpus"):
        prepare(tmp_path, train=str(corpus_path), validation_fraction=0.4)
    assert (tmp_path / "train.txt").read_bytes() == before


def test_a_prepared_corpus_is_reused_wherever_it_is_moved(corpus_path, tmp_path):
    first = prepare(tmp_path / "a", train=str(corpus_path))
    written = (tmp_path / "a" / "train.txt").stat().st_mtime_ns
    assert prepare(tmp_path / "a", train=str(corpus_path)) == first
    assert (tmp_path / "a" / "train.txt").stat().st_mtime_ns == written
    (tmp_path / "a").rename(tmp_path / "b")
    assert prepare(tmp_path / "b", train=str(corpus_path)).train.path == tmp_path / "b" / "train.txt"


def test_empty_and_missing_text_are_refused(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt leaves no training document"):
        prepare(tmp_path / "data", train=str(empty))
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        prepare(tmp_path / "data", train=str(tmp_path / "nowhere.txt"))


def test_the_standard_library_is_there_and_without_its_tests():
    files = corpus.standard_library_files()
    names = {path.name for path in files}
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not any("site-packages" in path.parts or "test" in path.parts for path in files)
    assert files == corpus.standard_library_files()
