"""Seeing that a run has gone astray while its loss is still a number, so that a sweep need not pay for its end.

A median of the last losses is held against the first loss, that of a model which knows nothing, and against the lowest
median so far. A single spike, which training recovers from, moves no median.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .errors import DivergedError
from .metrics import Row, of_kind

WINDOW = 10
"""Steps that a median is taken over."""
ABOVE_START = 1.0
"""Nats over the first loss: the model is 2.7 times as surprised by its text as one that knows nothing."""
ABOVE_BEST = 2.0
"""Nats over the lowest median: 7.4 times the perplexity that the run had reached."""


class DivergenceWatch:
    """A watcher of metrics that raises DivergedError. `rows`: what the run has written before."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.losses: list[tuple[int, float]] = []
        self.best: float | None = None
        for row in of_kind(list(rows), "step"):
            self._add(row["step"], row["loss"])

    def __call__(self, row: Row) -> None:
        if row["kind"] == "resume":
            kept = [(step, loss) for step, loss in self.losses if step <= row["step"]]
            self.losses, self.best = [], None
            for step, loss in kept:
                self._add(step, loss)
        elif row["kind"] == "step":
            self._add(row["step"], row["loss"])
            self._judge(row["step"])

    def _add(self, step: int, loss: float) -> None:
        self.losses.append((step, loss))
        if len(self.losses) >= WINDOW:
            level = self._level()
            self.best = level if self.best is None else min(level, self.best)

    def _level(self) -> float:
        return median(loss for _, loss in self.losses[-WINDOW:])

    def _judge(self, step: int) -> None:
        if self.best is None:
            return
        level, first = self._level(), self.losses[0][1]
        if level > first + ABOVE_START:
            reason = f"{level - first:.2f} above the first one ({first:.2f})"
        elif level > self.best + ABOVE_BEST:
            reason = f"{level - self.best:.2f} above the best before ({self.best:.2f})"
        else:
            return
        raise DivergedError(f"diverged at step {step}: the loss stands at {level:.2f}, {reason}")
