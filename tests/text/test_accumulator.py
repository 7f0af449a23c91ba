"""Counts that outgrow their budget go to disk and come back whole."""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from cs336_registry.text import accumulator
from cs336_registry.text.accumulator import Accumulator
from cs336_registry.text.training_cache import WordCounts


@pytest.mark.parametrize("number_of_runs", [1, 3, 4, 5, 7, 30])
def test_runs_are_merged_a_few_at_a_time(monkeypatch, number_of_runs):
    monkeypatch.setattr(accumulator, "MOST_OPEN", 3)
    is_open, most_open, most_bytes = 0, 0, 0
    read_run = accumulator._read_run

    def counted(path):
        nonlocal is_open, most_open, most_bytes
        is_open += 1
        most_open = max(most_open, is_open)
        yield from read_run(path)
        is_open -= 1
        most_bytes = max(most_bytes, sum(file.stat().st_size for file in path.parent.iterdir()))

    monkeypatch.setattr(accumulator, "_read_run", counted)
    expected = Counter()
    with Accumulator(1) as sums:
        sums.most_entries = 1
        for number in range(number_of_runs):
            part = {b"all": 2**40, b"%d" % number: 1, b"%d" % (number % 4): 5}
            sums.add(WordCounts.of(part))
            expected.update(part)
        assert len(sums.runs) == number_of_runs
        folder = sums.runs[0].parent
        spilled = sum(run.stat().st_size for run in sums.runs)
        assert sums.total().to_dict() == dict(expected)
        assert sorted(folder.iterdir()) == sorted(sums.runs)
    assert not folder.exists()
    assert most_open <= 3
    assert most_bytes <= 2 * spilled


def test_a_full_temporary_folder_is_named_with_its_cure(monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(accumulator, "open", lambda path, mode: Full(), raising=False)
    with Accumulator(1) as sums:
        sums.most_entries = 1
        with pytest.raises(OSError, match=r"No space left .* outgrew max_ram: free some, or set TMPDIR to") as raised:
            sums.add(WordCounts.of({b"a": 1, b"b": 1}))
    assert raised.value.errno == errno.ENOSPC
    assert Path(raised.value.filename).parent == Path(tempfile.gettempdir())
