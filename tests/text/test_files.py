"""Atomic writes: whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cs336_registry.text.files import atomic_write, write_bytes, write_json, write_text


def test_content_appears_whole(tmp_path):
    write_bytes(tmp_path / "new" / "folder" / "a.bin", b"\x00\xff")
    write_text(tmp_path / "a.txt", "ü\r\n")
    write_json(tmp_path / "a.json", {"ü": 1})
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"\x00\xff"
    assert (tmp_path / "a.txt").read_bytes() == "ü\r\n".encode()
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{"ü": 1}\n'


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "kept.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="on the way"), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError("on the way")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_nothing_is_seen_before_the_end(tmp_path):
    path = tmp_path / "late.txt"
    with atomic_write(path, "w") as file:
        file.write("text")
        file.flush()
        assert not path.exists()
    assert path.read_text() == "text"


@pytest.mark.skipif(os.name != "posix", reason="permissions and links are posix")
def test_permissions_and_links_are_respected(tmp_path):
    mask = os.umask(0o022)
    try:
        write_text(tmp_path / "real.txt", "a")
    finally:
        os.umask(mask)
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o644
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link.txt", "b")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "b"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are posix")
def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"content")
    reader.join()
    assert found == [b"content"] and pipe.is_fifo()


def test_a_full_disk_is_an_error_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kept.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_the_text_side_imports_no_framework():
    program = (
        "import sys, cs336_registry.text.training_cache, cs336_registry.text.inputs, cs336_registry.text.progress, "
        "cs336_registry.components.bpe_trainer, cs336_registry.components.tokenizer;"
        "assert not {'torch', 'triton', 'numba', 'numpy', 'regex', 'rich', 'pyarrow', 'zstandard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_keeps_what_was_there(tmp_path, monkeypatch, full):
    write_text(tmp_path / "a.txt", "old")

    def fsync(descriptor):
        raise OSError(full, os.strerror(full))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"free some space and run it again: '.*a\.txt'") as raised:
            write_text(tmp_path / "a.txt", "new")
    assert raised.value.errno == full
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_what_killed_writers_of_the_same_file_left_goes_once_it_is_old(tmp_path):
    names = (".a[1].bin.0123456789ab.tmp", ".a[1].bin.ba9876543210.tmp", ".a[1].bin.backup.tmp", ".b.0123456789ab.tmp")
    for name in names:
        (tmp_path / name).write_bytes(b"half")
        if name != names[1]:
            os.utime(tmp_path / name, (0, 0))
    with atomic_write(tmp_path / "a[1].bin") as file:
        assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], Path(file.name).name])
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "a[1].bin"])


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "sealed").mkdir()
    target = tmp_path / "sealed" / ("x" * 300)
    with pytest.raises(OSError, match="File name too long") as raised:
        write_text(target, "text")
    assert raised.value.filename == str(target)
    assert not list(target.parent.iterdir())
