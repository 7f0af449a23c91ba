"""Proof that a killed run continues exactly: the same run, once left alone and once killed at random steps.

Both are trained by processes of their own, as `cs336 train` would. A kill is SIGKILL, which no process can answer, at
any moment: in the middle of a step, of a row of metrics, of a checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ..errors import RegistryError
from ..text.progress import duration
from .configuration import Configuration, from_dict, load
from .errors import RunError
from .progress import Progress
from .run_comparison import Comparison, compare
from .run_folder import RunFolder

POLL_SECONDS = 0.005
EVENTS = 10
"""How often a short run saves."""
ATTEMPTS = 5


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: behind which step it fell, and from where the run went on."""

    step: int
    continued_from: int


@dataclass(frozen=True)
class Verdict:
    """kills: in order; comparison: of the killed run with the one that was left alone."""

    kills: tuple[Kill, ...]
    comparison: Comparison


def short(source: str, steps: int, settings: list[str]) -> Configuration:
    """`source` cut to `steps` optimizer steps at its own learning rates, saving and evaluating often, on the CPU.

    `settings` go last, so they can change any of that.
    """
    whole = load(source, settings)
    every = max(1, steps // EVENTS)
    cut = [
        f"training.steps={steps}",
        f"schedule.cosine_steps={max(whole.cosine_steps, steps)}",
        f"checkpoint.every={every}",
        f"evaluation.every={3 * every}",
        "evaluation.sequences=8",
        "evaluation.final_sequences=32",
        f"evaluation.sample_tokens={min(16, whole.evaluation.sample_tokens)}",
        *(["training.device=cpu"] if whole.training.device == "auto" else []),
    ]
    return load(source, [*cut, *settings])


def check(configuration: Configuration, out: Path, *, kills: int, seed: int, progress: Progress) -> Verdict:
    """Train `configuration` in `out`/whole and, killed `kills` times, in `out`/killed; compare them.

    Both folders are begun anew. Raises RunError where a run fails or is over before it can be killed.
    """
    steps = configuration.training.steps
    if steps < kills + 3:
        raise RunError(
            f"{steps} steps are too few for {kills} kills: ask for {kills + 3} steps or more, or fewer kills"
        )
    whole, killed = out / "whole", out / "killed"
    content = configuration.to_dict()
    if configuration.data.folder is None:
        # Both read the same tokens; making them is no part of what is compared.
        content["data"]["folder"] = str(out / "data")
    for folder in (whole, killed):
        shutil.rmtree(folder, ignore_errors=True)
    progress.say(f"training {steps} steps undisturbed ...")
    start = time.monotonic()
    _finish(*_start(content, whole), whole)
    progress.say(f"the same again, killed at {kills} random moments (seed {seed}) ...")
    landed = _killed(content, killed, kills, random.Random(seed), progress)
    _finish(*_start(content, killed), killed)
    progress.say(f"trained to the end after {duration(time.monotonic() - start)}; comparing ...")
    return Verdict(landed, compare(whole, killed))


def describe(verdict: Verdict) -> list[str]:
    """The verdict in lines for a terminal."""
    found = verdict.comparison
    lines = [f"killed behind step {one.step}, went on from step {one.continued_from}" for one in verdict.kills]
    rows = ", ".join(f"{count} {kind} rows" for kind, count in found.rows.items())
    lines.append(f"compared: {rows}, {found.tensors} tensors of {found.numbers:,} numbers")
    if found.equal:
        return [*lines, "EXACT: losses, weights and optimizer state are those of the undisturbed run, bit for bit"]
    shown = [f"  {one}" for one in found.differences[:10]]
    more = len(found.differences) - len(shown)
    return [
        *lines,
        *(["undisturbed run, and killed run:", *shown] + ([f"  and {more:,} more"] if more else [])),
        f"NOT EXACT: {len(found.differences):,} differences; the first step that differs follows the checkpoint whose "
        f"state is incomplete (cs336 bisect finds the component to blame among two backends)",
    ]


def _killed(
    content: dict[str, Any], folder: Path, kills: int, generator: random.Random, progress: Progress
) -> tuple[Kill, ...]:
    """Train in `folder`, killed `kills` times; begun anew, with earlier kills, where a fast run escapes."""
    latest = content["training"]["steps"]
    for _ in range(ATTEMPTS):
        latest = max(kills + 2, 2 * latest // 3)
        shutil.rmtree(folder, ignore_errors=True)
        landed = [_kill(content, folder, step, generator) for step in sorted(generator.sample(range(2, latest), kills))]
        if None not in landed:
            return tuple(kill for kill in landed if kill)
        progress.say("the run was over before it could be killed; again, earlier ...")
    raise RunError(f"{content['training']['steps']} steps are over before they can be killed: ask for more --steps")


def _kill(content: dict[str, Any], folder: Path, target: int, generator: random.Random) -> Kill | None:
    """Start the run, kill it behind step `target`; None where it came to its end."""
    run = RunFolder(folder)
    size = run.metrics_path.stat().st_size if run.metrics_path.is_file() else 0
    process, connection = _start(content, folder)
    while process.is_alive() and _last_step(run.metrics_path, size) < target:
        time.sleep(POLL_SECONDS)
    time.sleep(generator.uniform(0, 2 * POLL_SECONDS))
    process.kill()
    process.join()
    if process.exitcode == 0:
        return None
    if process.exitcode != -signal.SIGKILL:
        raise RunError(f"the run in {folder} failed: {_reason(process, connection)}")
    saved = [int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*")]
    return Kill(_last_step(run.metrics_path, 0), max(saved, default=0))


def _last_step(metrics: Path, beyond: int) -> int:
    """The last step that was written, 0 while the file is no longer than `beyond` bytes."""
    if not metrics.is_file() or metrics.stat().st_size <= beyond:
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(beyond, metrics.stat().st_size - 4096))
        lines = file.read().split(b"\n")
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            # The first and the last of these lines may be half a row.
            continue
        return max(0, row["step"])
    return 0


def _start(content: dict[str, Any], folder: Path) -> tuple[BaseProcess, Connection]:
    methods = multiprocessing.get_all_start_methods()
    # A fork server imports PyTorch once, for all the processes.
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["cs336_registry.pipeline.training"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(content, folder, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _finish(process: BaseProcess, connection: Connection, folder: Path) -> None:
    process.join()
    if process.exitcode:
        raise RunError(f"the run in {folder} failed: {_reason(process, connection)}")


def _reason(process: BaseProcess, connection: Connection) -> str:
    try:
        return connection.recv()
    except EOFError:
        return f"its process ended with status {process.exitcode}"


def _train(content: dict[str, Any], folder: Path, connection: Connection) -> None:
    """What a process of its own does."""
    from . import training

    try:
        training.train(from_dict(content), folder, progress=Progress(quiet=True))
    except (RegistryError, ValueError, OSError) as error:
        connection.send(str(error))
        raise SystemExit(1) from None
