"""A finished or running run as a report reads it from its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .metrics import Row, of_kind
from .run_folder import RunFolder

COLORS = 6
LINES = ("line", "dashed", "dotted")


@dataclass(frozen=True)
class Run:
    """Everything the page says about a run, read from its folder.

    color: its place in the palette, from 1; line: its style, where there are more runs than colors.
    """

    name: str
    color: int
    record: Mapping[str, Any]
    rows: Sequence[Row]
    folder: RunFolder
    line: str = "line"

    @cached_property
    def steps(self) -> list[Row]:
        return of_kind(list(self.rows), "step")

    @cached_property
    def evaluations(self) -> list[Row]:
        return of_kind(list(self.rows), "evaluation")

    @cached_property
    def diverged(self) -> Row | None:
        """Where the run was given up, if it was."""
        return next(iter(of_kind(list(self.rows), "divergence")), None)

    @property
    def configuration(self) -> Mapping[str, Any]:
        return self.record["configuration"]

    @property
    def last(self) -> Row | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def tokens_trained(self) -> int:
        training, model = self.configuration["training"], self.configuration["model"]
        return (self.steps[-1]["step"] if self.steps else 0) * training["batch_size"] * model["context_length"]

    @property
    def tokens_per_second(self) -> float | None:
        """The median over steps: the first steps are slower, and so is a machine with other work."""
        rates = sorted(row["tokens_per_second"] for row in self.steps)
        return rates[len(rates) // 2] if rates else None

    @property
    def seconds(self) -> float:
        return max((row["seconds"] for row in self.rows if "seconds" in row), default=0.0)

    def of(self, name: str) -> Mapping[str, Any]:
        return self.record.get(name) or {}


def read(path: Path, number: int) -> Run:
    folder = RunFolder(path)
    record = folder.record()
    name, line = path.name or record["configuration"]["name"], LINES[number // COLORS % len(LINES)]
    return Run(name, number % COLORS + 1, record, folder.metrics(), folder, line)
