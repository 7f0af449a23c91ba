"""Telling how far long work has come: a bar on a terminal, a line now and then elsewhere, nothing unless asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

LINE_EVERY_SECONDS = 600.0
LINES = 10


def duration(seconds: float) -> str:
    """A time for people: "42 s", "5 min 10 s", "3 hr 2 min", "2 d 4 hr"."""
    whole = max(0, round(seconds))
    units = [("d", whole // 86400), ("hr", whole // 3600 % 24), ("min", whole // 60 % 60), ("s", whole % 60)]
    first = next((index for index, (_, number) in enumerate(units) if number), len(units) - 1)
    return " ".join(f"{number} {unit}" for unit, number in units[first : first + 2] if number) or "0 s"


class Progress:
    """Progress of one phase of `total` units, as a context manager; `update(done)` says how far it has come.

    enabled=False (the default) writes nothing. On a terminal it is a bar with rate and time left; elsewhere a line at
    every tenth of the way and every ten minutes, whichever is first, and one at the end.
    """

    def __init__(
        self,
        phase: str,
        total: int,
        unit: str,
        *,
        enabled: bool | None = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.phase, self.total, self.unit, self.enabled = phase, total, unit, bool(enabled)
        self._stream, self._clock = stream or sys.stderr, clock
        self._start = self._last_line = clock()
        self._initial = self._done = 0
        self._lines_passed = 0
        self._bar = None

    def __enter__(self) -> Progress:
        self._start = self._last_line = self._clock()
        if self.enabled and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = RichProgress(*columns, console=Console(file=self._stream), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.phase, total=self.total, note="")
        return self

    def resume(self, done: int) -> None:
        """Work that was there already: it counts as done and not towards the rate."""
        self._initial = self._done = done
        self._lines_passed = done * LINES // max(self.total, 1)

    def update(self, done: int) -> None:
        self._done = done
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self._note())
            return
        now, lines = self._clock(), done * LINES // max(self.total, 1)
        if (lines > self._lines_passed or now - self._last_line >= LINE_EVERY_SECONDS) and done < self.total:
            self._lines_passed, self._last_line = lines, now
            self._write_line()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self.enabled and kind is None:
            elapsed = self._clock() - self._start
            self._stream.write(f"{self.phase}: {self._done:,} {self.unit} in {duration(elapsed)} ({self._rate()})\n")
            self._stream.flush()

    def _write_line(self) -> None:
        share = self._done / max(self.total, 1)
        done = f"{self._done:,} of {self.total:,} {self.unit}"
        self._stream.write(f"{self.phase}: {share:.0%} ({done}), {self._note()}\n")
        self._stream.flush()

    def _rate(self) -> str:
        elapsed = self._clock() - self._start
        rate = (self._done - self._initial) / elapsed if elapsed > 0 else 0.0
        return f"{rate:,.{0 if rate >= 10 else 2}f} {self.unit}/s"

    def _note(self) -> str:
        elapsed, fresh = self._clock() - self._start, self._done - self._initial
        if fresh <= 0 or elapsed <= 0:
            return "starting"
        left = duration((self.total - self._done) * elapsed / fresh)
        return f"{self._rate()}, {left} left, {duration(elapsed)} elapsed"
