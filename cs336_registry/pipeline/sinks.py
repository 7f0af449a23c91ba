"""Where a run's metrics go beside metrics.jsonl: TensorBoard, trackio or Weights & Biases, each behind an extra.

    [metrics]
    sinks = ["tensorboard"]

metrics.jsonl stays the record: a sink that fails while the run goes on is left out from then on, with a warning.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from typing import Any, Protocol

from .configuration import Configuration
from .errors import RunError
from .metrics import Row, Watcher
from .run_folder import RunFolder

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes the rows that count, in order; `start` comes first, in every process that continues the run."""

    def start(self, row: Row) -> None: ...

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


@contextmanager
def opened(configuration: Configuration, folder: RunFolder) -> Iterator[list[Watcher]]:
    """The configured sinks as watchers of the metrics. Raises RunError, before any work, where a package is missing."""
    names = configuration.metrics.sinks
    for name in names:
        if find_spec(name) is None:
            raise RunError(
                f"metrics.sinks names {name!r}, which is not installed: pip install 'cs336-registry[{name}]', or take "
                f"it out of metrics.sinks (metrics.jsonl is written anyway)"
            )
    guarded = [_Guarded(name, SINKS[name](configuration, folder)) for name in names]
    try:
        yield list(guarded)
    finally:
        for sink in guarded:
            sink.close()


class TensorBoard:
    """Event files in the run's folder `tensorboard`. A continued run's are written anew from metrics.jsonl, since a
    killed process took with it what it had not flushed."""

    def __init__(self, configuration: Configuration, folder: RunFolder) -> None:
        self.folder = folder

    def start(self, row: Row) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # purge_step hides the events of earlier processes.
        self.writer = SummaryWriter(str(self.folder.path / "tensorboard"), purge_step=0)
        for earlier in self.folder.metrics():
            # Later ones were lost with the process that wrote them.
            if earlier["step"] <= row["step"]:
                self.write(earlier)

    def write(self, row: Row) -> None:
        if row["kind"] == "sample":
            self.writer.add_text(f"sample/{row['prompt']!r}", row["text"], row["step"])
        for name, value in _numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.writer.close()


class _Service:
    """A logging package that is called as Weights & Biases has it: init gives a run with log and finish."""

    package: str

    def __init__(self, configuration: Configuration, folder: RunFolder) -> None:
        self.configuration, self.folder = configuration, folder

    def start(self, row: Row) -> None:
        self.run = import_module(self.package).init(
            project=self.configuration.metrics.project,
            config=self.configuration.to_dict(),
            resume="allow",
            **self.identity(),
        )

    def identity(self) -> dict[str, str]:
        """By what the service finds the run again."""
        raise NotImplementedError

    def write(self, row: Row) -> None:
        if values := _numbers(row):
            self.run.log(values, step=row["step"])

    def close(self) -> None:
        self.run.finish()


class Trackio(_Service):
    """A local trackio project. Steps that a killed run repeats appear twice there, with equal values."""

    package = "trackio"

    def identity(self) -> dict[str, str]:
        return {"name": f"{self.configuration.name}-{_digest(self.folder)}"}


class WeightsAndBiases(_Service):
    """A run of Weights & Biases. It ignores the steps that a killed run repeats."""

    package = "wandb"

    def identity(self) -> dict[str, str]:
        return {"name": self.configuration.name, "id": _digest(self.folder), "dir": str(self.folder.path)}


SINKS: dict[str, type[TensorBoard | Trackio | WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WeightsAndBiases,
}


class _Guarded:
    """A sink that can't harm the run."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name, self.sink = name, sink
        self.working = False

    def __call__(self, row: Row) -> None:
        if row["kind"] == "resume":
            self.working = True
            self._try(self.sink.start, row)
        elif self.working:
            self._try(self.sink.write, row)

    def close(self) -> None:
        if self.working:
            self._try(self.sink.close)

    def _try(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:
            # Whatever a logging service does, hours of training are worth more.
            self.working = False
            logger.warning(
                "the metrics sink %s failed (%s: %s): the run goes on without it; metrics.jsonl has every row",
                self.name,
                type(error).__name__,
                error,
            )


def _numbers(row: Row) -> dict[str, float]:
    """The row's measured values as "kind/name"."""
    if row["kind"] not in ("step", "evaluation"):
        return {}
    return {
        f"{row['kind']}/{name}": float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, Real) and not isinstance(value, bool)
    }


def _digest(folder: RunFolder) -> str:
    """The same for every process that works in this run, another for a run begun anew in the same folder."""
    return hashlib.sha256(f"{folder.path.absolute()} {folder.record()['started']}".encode()).hexdigest()[:16]
