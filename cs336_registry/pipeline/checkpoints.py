"""A run's checkpoints: one folder a step, which appears complete or not at all; the last few and the best are kept.

checkpoints/step-00000100/checkpoint.pt   weights, optimizer, iteration (the save_checkpoint component), or
checkpoints/step-00000100/shards/         the same, written by several processes at once (sharded_checkpoint.py)
checkpoints/step-00000100/state.json      what else an exact continuation needs, and what it must match
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..text.files import sync_folder, write_json
from . import sharded_checkpoint
from .errors import MismatchError, RunError
from .process_group import ProcessGroup, lost_contact
from .sharded_checkpoint import ShardedTensors

State = dict[str, Any]
SHARDS = "shards"


class Checkpoints:
    """The checkpoints in `folder`, written and read through the two components; by all processes of `group`."""

    def __init__(
        self,
        folder: Path,
        save: Callable[..., None],
        load: Callable[..., int],
        *,
        keep_last: int,
        keep_best: bool,
        group: ProcessGroup | None = None,
    ) -> None:
        self.folder, self._save, self._load = folder, save, load
        self.keep_last, self.keep_best = keep_last, keep_best
        self.group = group or ProcessGroup()

    def steps(self) -> list[int]:
        """The steps that are saved, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*") if path.is_dir())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def state(self, step: int) -> State:
        """What was saved beside the weights of `step`."""
        path = self.path(step) / "state.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MismatchError(
                f"{path} can't be read ({error}): delete {path.parent} to continue from an earlier checkpoint"
            ) from None

    def save(
        self, step: int, model: Any, optimizer: Any, state: State, tensors: Mapping[str, Any] | None = None
    ) -> None:
        """Write step's checkpoint; RunError (a full disk) leaves the earlier ones as they are.

        tensors: what each of several processes writes instead of the whole model and optimizer.
        """
        temporary = self.folder / f".step-{step:08d}.tmp"
        try:
            self.group.decided(lambda: self._begin(temporary))
            if tensors is None:
                self._save(model, optimizer, step, temporary / "checkpoint.pt")
            else:
                sharded_checkpoint.write(temporary / SHARDS, tensors)
            self.group.decided(lambda: self._publish(temporary, self.path(step), state))
        except (OSError, RuntimeError) as error:
            if lost_contact(error):
                raise
            if self.group.first:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = self.steps()
            free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
            raise RunError(
                f"the checkpoint of step {step} can't be written to {self.folder} ({error}; {free / 1e6:,.0f} MB are "
                f"free). {f'Step {kept[-1]} is kept' if kept else 'None was written before'}: make room and run the "
                f"same command again to continue"
            ) from error

    def load(self, step: int, model: Any, optimizer: Any) -> None:
        """Put the weights and the optimizer's state of `step` into place; without an optimizer the weights alone.

        With an optimizer the checkpoint must not be sharded: `shards` gives those to whoever takes them apart.
        """
        with self.reading(step):
            shards = self.shards(step)
            if shards is None:
                self._load(self.path(step) / "checkpoint.pt", model, optimizer)
            else:
                shards.read(sharded_checkpoint.weights(model))

    def shards(self, step: int) -> ShardedTensors | None:
        """What several processes wrote at `step`; None where one did."""
        folder = self.path(step) / SHARDS
        return ShardedTensors(folder) if folder.is_dir() else None

    @contextmanager
    def reading(self, step: int) -> Iterator[None]:
        """Turns what a damaged checkpoint causes into a MismatchError that says what to do."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise MismatchError(
                f"{self.path(step) / (SHARDS if self.shards(step) else 'checkpoint.pt')} can't be loaded ({error}): "
                f"delete {self.path(step)} to continue from an earlier checkpoint"
            ) from error

    def prune(self, best_step: int | None) -> None:
        """Delete all but the last few and the best."""
        if not self.group.first:
            return
        steps = self.steps()
        kept = {*steps[-self.keep_last :], *([best_step] if self.keep_best else [])}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.path(step))

    def _begin(self, temporary: Path) -> None:
        """Remove what killed processes left half-written (the run's lock says that no other is alive)."""
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)

    def _publish(self, temporary: Path, path: Path, state: State) -> None:
        """Everything is written and flushed: give it its name."""
        write_json(temporary / "state.json", state)
        for folder in (temporary, temporary / SHARDS):
            if folder.exists():
                sync_folder(folder)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync_folder(self.folder)
