"""Progress that shows rate and time left: bars in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from ..text.progress import duration

PLAIN_INTERVAL = 5.0
"""Seconds between two lines of one stage where there is no terminal."""


class Stage(Protocol):
    """A piece of work that is under way."""

    def advance(self, count: int) -> None:
        """`count` more of the stage's unit is done."""

    def note(self, text: str) -> None:
        """Something worth seeing beside the bar, such as the loss."""


class Progress:
    """Where a run reports what it is doing. `quiet` reports nothing."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self._in_terminal = self.stream.isatty()

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self.quiet:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Stage]:
        """Work on `total` units of which `done` were done before; unit "B" is shown as MB."""
        if self.quiet:
            yield _Silent()
        elif self._in_terminal:
            with _bar(self.stream) as bar:
                yield _Bar(bar, name, total, unit, done)
        else:
            stage = _Lines(self, name, total, unit, done)
            yield stage
            stage.finish()


def amount(count: float, unit: str) -> str:
    """12.3 MB for bytes, 1,234 tokens for the rest."""
    if unit == "B":
        return f"{count / 1e6:,.1f} MB"
    return f"{count:,.1f} {unit}" if count < 10 and count != int(count) else f"{count:,.0f} {unit}"


class _Silent:
    def advance(self, count: int) -> None:
        """Nobody is watching."""

    def note(self, text: str) -> None:
        """Nobody is watching."""


class _Lines:
    def __init__(self, progress: Progress, name: str, total: int | None, unit: str, done: int) -> None:
        self.progress, self.name, self.total, self.unit = progress, name, total, unit
        self.done, self.before, self.text = done, done, ""
        self.start = self.last = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.last >= PLAIN_INTERVAL:
            self._print()

    def note(self, text: str) -> None:
        self.text = text

    def finish(self) -> None:
        took = time.monotonic() - self.start
        note = f", {self.text}" if self.text else ""
        self.progress.say(f"{self.name}: {amount(self.done, self.unit)} in {duration(took)}{note}")

    def _print(self) -> None:
        self.last = time.monotonic()
        rate = (self.done - self.before) / (self.last - self.start)
        parts = [f"{self.name}: {amount(self.done, self.unit)}"]
        parts[0] += f" of {amount(self.total, self.unit)}" if self.total else ""
        parts.append(f"{amount(rate, self.unit)}/s")
        if self.total and rate > 0:
            parts.append(f"{duration((self.total - self.done) / rate)} left")
        self.progress.say(", ".join([*parts, *([self.text] if self.text else [])]))


class _Bar:
    def __init__(self, bar: Any, name: str, total: int | None, unit: str, done: int) -> None:
        self.bar, self.unit, self.before = bar, unit, done
        self.task = bar.add_task(name, total=total, completed=done, rate="", note="", unit=unit)
        self.start = time.monotonic()

    def advance(self, count: int) -> None:
        self.bar.advance(self.task, count)
        done = self.bar.tasks[self.task].completed - self.before
        rate = done / max(1e-6, time.monotonic() - self.start)
        self.bar.update(self.task, rate=f"{amount(rate, self.unit)}/s")

    def note(self, text: str) -> None:
        self.bar.update(self.task, note=text)


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("[cyan]{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("[dim]left[/dim]"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(file=stream),
        refresh_per_second=5,
    )
