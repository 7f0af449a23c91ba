"""What the text commands share."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest

from cs336_registry.cli.text_backends import disk_full


def test_a_full_disk_is_the_one_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    out = Path("made")
    for name, place in [
        (None, "made is made: what was"),
        (tmp_path / "made" / "vocab.json", "made is made: what was"),
        (
            tmp_path / "cache" / "counts",
            rf"made is made \(by writing {tmp_path}/cache/counts\): .* free some space and run",
        ),
        (tmp_path / "temporary" / "cs336_counts_x" / "run_3", r"run_3\): .* free some space there, or set TMPDIR to a"),
    ]:
        with pytest.raises(OSError, match=f"the disk is full while .*{place}"), disk_full(out):
            raise OSError(errno.ENOSPC, "No space left on device", None if name is None else str(name))
    with pytest.raises(PermissionError, match="not ours"), disk_full(out):
        raise PermissionError(errno.EACCES, "not ours")
