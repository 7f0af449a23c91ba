"""Progress: silent unless asked, a line now and then, times for people."""

from __future__ import annotations

import io

import pytest

from cs336_registry.text.progress import Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (61, "1 min 1 s"),
        (3600, "1 hr"),
        (10_930, "3 hr 2 min"),
        (2e5, "2 d 7 hr"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def run(total, seconds_each, enabled=True, resumed=0):
    now, stream = [0.0], io.StringIO()
    with Progress("merging", total, "merges", enabled=enabled, stream=stream, clock=lambda: now[0]) as progress:
        progress.resume(resumed)
        for done in range(resumed, total + 1):
            progress.update(done)
            now[0] += seconds_each
    return stream.getvalue().splitlines()


def test_silent_by_default():
    assert run(100, 1, enabled=False) == []


def test_a_line_every_tenth():
    lines = run(1000, 1)
    assert len(lines) == 10
    assert lines[2] == "merging: 30% (300 of 1,000 merges), 1.00 merges/s, 11 min 40 s left, 5 min elapsed"
    assert lines[-1].startswith("merging: 1,000 merges in 16 min 41 s")


def test_a_line_every_ten_minutes():
    lines = run(100, 400)
    assert len(lines) == 50
    assert "left" in lines[1]


def test_resumed_work_counts_as_done_but_not_towards_the_rate():
    lines = run(100, 10, resumed=50)
    assert lines[0].startswith("merging: 60% (60 of 100 merges), 0.10 merges/s, 6 min 40 s left")


def test_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream, now = Terminal(), [0.0]
    with Progress("counting", 10, "bytes", enabled=True, stream=stream, clock=lambda: now[0]) as progress:
        for done in range(11):
            now[0] += 60
            progress.update(done)
    assert "bytes/s, 0 s left, 11 min elapsed" in stream.getvalue()
    assert "counting" in stream.getvalue()
    assert "10/10" in stream.getvalue()
