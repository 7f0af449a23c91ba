"""Every kind of file gives the same text, in blocks."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from cs336_registry.text import inputs, samples
from cs336_registry.text.inputs import MalformedCounter, byte_texts, expand, is_plain, kind, texts, utf8

TEXT = "one 🙂\r\ntwo\x85 <|endoftext|> drei\n" * 50


def read(path, block_size=7):
    return ["".join(text) for text in texts(path, block_size)]


def test_plain_text_is_not_translated(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    assert read(tmp_path / "a.txt") == read(str(tmp_path / "a.txt")) == [TEXT]


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_malformed_bytes_decode_as_in_one_piece(tmp_path, size):
    content = samples.tricky_bytes(200, seed=3)
    (tmp_path / "a").write_bytes(content)
    assert read(tmp_path / "a", size) == [content.decode("utf-8", "replace")]


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("end", [b"", "🙂".encode()[:3]])
def test_malformed_bytes_are_counted_as_in_one_piece(size, end):
    content = samples.tricky_bytes(200, seed=3) + "its own \ufffd".encode() * 3 + end
    counter = MalformedCounter()
    for start in range(0, len(content), size):
        counter(content[start : start + size])
    assert counter.total == content.decode("utf-8", "replace").count("\ufffd") - content.count("\ufffd".encode()) > 0


def test_gzip(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()) + gzip.compress(b"more"))
    assert read(tmp_path / "a.txt.gz") == [TEXT + "more"]


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="needs the extra `files`")
    packed = zstandard.compress(TEXT.encode())
    (tmp_path / "a.zst").write_bytes(packed + packed)
    assert read(tmp_path / "a.zst") == [TEXT * 2]
    (tmp_path / "b.zst").write_bytes(b"no frame at all")
    with pytest.raises(ValueError, match=r"b\.zst is damaged"):
        read(tmp_path / "b.zst")


@pytest.mark.parametrize("step", [1, 5, 1 << 10])
def test_zstandard_that_is_cut_short_is_damaged(tmp_path, monkeypatch, step):
    zstandard = pytest.importorskip("zstandard", reason="needs the extra `files`")
    monkeypatch.setattr(inputs, "_FRAME_STEP", step)
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    packed = zstandard.compress(TEXT.encode())
    path = tmp_path / "a.zst"
    path.write_bytes(skippable + packed + zstandard.compress(b"") + packed + skippable)
    assert read(path) == [TEXT * 2]
    path.write_bytes(b"")
    assert read(path) == [""]
    for left in (packed[:-1], packed[:10], packed[:2]):
        for before in (b"", packed):
            path.write_bytes(before + left)
            with pytest.raises(ValueError, match=r"a\.zst is damaged \(it ends in the middle of a frame\): fetch or"):
                read(path)


def test_zstandard_takes_little_memory(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="needs the extra `files`")
    (tmp_path / "a.zst").write_bytes(zstandard.compress(b"some text " * 9_000_000))
    assert largest_memory(tmp_path / "a.zst", 90_000_000) < 40_000_000


def test_json_lines(tmp_path):
    lines = [json.dumps({"text": TEXT}), "", json.dumps({"id": 1, "text": "ü", "x": []}, ensure_ascii=False)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.jsonl.gz") == [TEXT, "ü"]
    (tmp_path / "b.jsonl").write_text('{"text": "\\ud83d\\ude42 \\ud800"}\n["text"]')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: expected a JSON object"):
        read(tmp_path / "b.jsonl")
    assert "".join(next(texts(tmp_path / "b.jsonl"))) == "🙂 \ufffd"


def test_a_character_that_is_cut_where_reading_stops_is_not_malformed():
    for is_whole in (True, False):
        counter = MalformedCounter(is_whole)
        counter("gr\xfcn ü".encode("latin-1") + "ü".encode()[:1])
        assert counter.total == 2 + is_whole


@pytest.mark.parametrize("name", ["a.jsonl.txt", "a.jsonl.1", "a.ndjson.part", "a.jsonl.parquet.txt", "jsonl"])
def test_json_lines_are_told_by_the_end_of_the_name(tmp_path, name):
    assert [kind(Path(known)) for known in ("a.ndjson", "b.jsonl.zst", "c.d.gz", "e.parquet")] == [
        *("jsonl", "jsonl.zst", "gz", "parquet")
    ]
    line = json.dumps({"text": "a"})
    (tmp_path / name).write_text(line)
    assert is_plain(tmp_path / name)
    assert read(tmp_path / name) == [line]


def test_plain_is_what_can_be_read_from_any_offset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-", "a.txt", "a.txt.gz"):
        Path(name).write_text("text")
    assert [is_plain(Path(name)) for name in ("a.txt", "a.txt.gz", "-", "none.txt")] == [True, False, False, False]
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe.txt")
        assert not is_plain(Path("pipe.txt"))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `files`")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": [TEXT, None, "ü"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [TEXT, "ü"]
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r'b\.parquet has no column "text": it has body'):
        read(tmp_path / "b.parquet")
    parquet.write_table(pyarrow.table({"text": ["ü".encode(), None, b"\xff"]}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == ["ü", "\ufffd"]
    parquet.write_table(pyarrow.table({"text": [[1], [2]]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r'b\.parquet: the column "text" has the type list<.*int64>: expected strings'):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(ValueError, match=r"c\.parquet is not a readable parquet file"):
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize("package, name", [("zstandard", "a.zst"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        ModuleNotFoundError, match=rf"needs the package {package}: pip install 'cs336-registry\[files\]'"
    ):
        read(tmp_path / name)


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    assert read("-") == [TEXT]


def test_folders_and_globs_are_sorted(tmp_path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden", "deep/.git/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt", "b.txt", "deep/c.txt"]
    assert read(str(tmp_path / "*.txt")) == ["a.txt", "b.txt"]
    assert read(str(tmp_path / "**" / "*.txt")) == ["a.txt", "b.txt", "deep/c.txt"]
    assert read([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == ["b.txt", "a.txt"]
    (tmp_path / "odd[1].txt").write_text("odd")
    assert read(str(tmp_path / "odd[1].txt")) == ["odd"]


def test_errors_name_the_path(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no files"):
        expand(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.md"):
        expand(str(tmp_path / "*.md"))
    with pytest.raises(TypeError, match="input_path is 7: pass a path"):
        expand(7)
    with pytest.raises(TypeError, match="input_path holds 7"):
        expand([7])


def test_long_files_take_little_memory(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text " * 3_000_000))
    assert largest_memory(tmp_path / "a.txt.gz", 30_000_000) < 8_000_000


def largest_memory(path, size):
    """The most that reading a file of so much text takes (bytes)."""
    tracemalloc.start()
    try:
        assert sum(len(block) for text in byte_texts(path) for block in text) == size
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_utf8_of_surrogates():
    assert utf8("a🙂") == "a🙂".encode()
    assert utf8("\ud83d\ude42\ud800") == "🙂\ufffd".encode()


def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("text")
    (tmp_path / "sealed").mkdir()
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("sealed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    assert expand(tmp_path) == [tmp_path / "open" / "a.txt"]
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(OSError, match=r"the folder .*sealed can't be read \(Permission denied\): allow it, or name"):
        expand(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="links are posix")
def test_links_are_followed(tmp_path):
    for name in ("corpus/a.txt", "elsewhere/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = tmp_path / "corpus"
    (corpus / "linked").symlink_to(tmp_path / "elsewhere")
    (corpus / "linked_too").symlink_to(tmp_path / "elsewhere")
    (corpus / ".hidden").symlink_to("nothing")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(corpus)
    (tmp_path / "elsewhere" / "self").symlink_to(".")
    assert expand(corpus) == [corpus / name for name in ("a.txt", "linked/b.txt", "linked/deep/c.txt")]
    (corpus / "z.txt").symlink_to("gone.txt")
    for path in (corpus, corpus / "z.txt", str(corpus / "*.txt")):
        with pytest.raises(
            FileNotFoundError, match=r"corpus/z\.txt is a link to gone\.txt, which is not there: mend it"
        ):
            expand(path)
