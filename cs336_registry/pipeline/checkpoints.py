"""A run's checkpoints: one folder a step, which appears complete or not at all; the last few and the best are kept.

checkpoints/step-00000100/checkpoint.pt   weights, optimizer, iteration (the save_checkpoint component)
checkpoints/step-00000100/state.json      what else an exact continuation needs, and what it must match
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..text.files import sync_folder, write_json
from .errors import MismatchError, RunError

State = dict[str, Any]


class Checkpoints:
    """The checkpoints in `folder`, written and read through the two components."""

    def __init__(
        self, folder: Path, save: Callable[..., None], load: Callable[..., int], *, keep_last: int, keep_best: bool
    ) -> None:
        self.folder, self._save, self._load = folder, save, load
        self.keep_last, self.keep_best = keep_last, keep_best

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

    def save(self, step: int, model: Any, optimizer: Any, state: State) -> None:
        """Write step's checkpoint; RunError (a full disk) leaves the earlier ones as they are."""
        temporary = self.folder / f".step-{step:08d}.{os.getpid()}.tmp"
        try:
            self._sweep()
            temporary.mkdir(parents=True)
            self._save(model, optimizer, step, temporary / "checkpoint.pt")
            write_json(temporary / "state.json", state)
            sync_folder(temporary)
            if self.path(step).exists():
                shutil.rmtree(self.path(step))
            os.replace(temporary, self.path(step))
            sync_folder(self.folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = self.steps()
            free = shutil.disk_usage(self.folder if self.folder.exists() else self.folder.parent).free
            raise RunError(
                f"the checkpoint of step {step} can't be written to {self.folder} ({error}; {free / 1e6:,.0f} MB are "
                f"free). {f'Step {kept[-1]} is kept' if kept else 'None was written before'}: make room and run the "
                f"same command again to continue"
            ) from error

    def load(self, step: int, model: Any, optimizer: Any) -> None:
        """Put the weights and the optimizer's state of `step` into place."""
        try:
            self._load(self.path(step) / "checkpoint.pt", model, optimizer)
        except (OSError, RuntimeError, ValueError) as error:
            raise MismatchError(
                f"{self.path(step) / 'checkpoint.pt'} can't be loaded ({error}): delete {self.path(step)} to continue "
                f"from an earlier checkpoint"
            ) from error

    def prune(self, best_step: int | None) -> None:
        """Delete all but the last few and the best."""
        steps = self.steps()
        kept = {*steps[-self.keep_last :], *([best_step] if self.keep_best else [])}
        for step in steps:
            if step not in kept:
                shutil.rmtree(self.path(step))

    def _sweep(self) -> None:
        """Remove what killed processes left half-written (the run's lock says that no other is alive)."""
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
