"""`cs336 sweep`: one configuration, several values."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from ..pipeline.sweep import Result


def sweep(
    config: str,
    /,
    *,
    vary: Annotated[Sequence[str], Parameter(negative=(), show_default=False)] = (),
    set: Annotated[Sequence[str], Parameter(negative=(), show_default=False)] = (),
    out: Path | None = None,
    backend: str | None = None,
    same_tokens: bool = False,
    quiet: bool = False,
) -> int:
    """Train every combination of the values that are varied, and compare them on one page.

    Started again, the same command skips the runs that are finished and continues one that was killed. A run diverges
    where its loss is no number, or its median over ten steps is far above the first loss (1 nat) or the best so far (2
    nats): it is stopped and marked, and the sweep goes on.

    Examples: `cs336 sweep quickstart --vary optimizer.lr=1e-4,3e-4,1e-3`, `cs336 sweep quickstart --vary
    model.norm=rms,none,post --vary model.position=rope,none`, `cs336 sweep quickstart --vary model.ffn=swiglu,silu`
    (with model.d_ff changed so that both have as many parameters), `cs336 sweep quickstart --vary
    training.batch_size=4,16,64 --same-tokens`.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration.
    vary
        A key and its values, separated by commas; several --vary make every combination.
    set
        Changes one value for all runs, such as training.steps=200; may be given several times.
    out
        The folder of the sweep, with a folder for every run; by default runs/NAME-sweep.
    backend
        A selector such as "triton,adamw=torch".
    same_tokens
        With training.batch_size varied: change the number of steps so that every run sees as many tokens.
    quiet
        Print the table alone.
    """
    from ..pipeline.configuration import load
    from ..pipeline.progress import Progress
    from ..pipeline.sweep import sweep as train_all

    settings = [*set, *([f"backend={backend}"] if backend is not None else [])]
    folder = out or Path("runs") / f"{load(config, settings).name}-sweep"
    progress = Progress(quiet=quiet)
    results = train_all(config, vary, folder, settings=settings, same_tokens=same_tokens, progress=progress)
    _show(results)
    progress.say(f"the comparison is {folder / 'report.html'}, its numbers {folder / 'sweep.json'}")
    return 0


def _show(results: Sequence[Result]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from ..text.progress import duration

    keys = [key for key, _ in results[0].variation.values]
    table = Table(*keys, "parameters", "steps", "validation loss", "bits per byte", "tokens/s", "time", box=SIMPLE_HEAD)
    for result in results:
        run, last = result.run, result.run.last or {}
        table.add_row(
            *(value for _, value in result.variation.values),
            f"{run.of('accounting')['parameters']:,}",
            f"{len(run.steps):,}",
            *(["diverged", ""] if result.diverged else [f"{last['loss']:.4f}", f"{last['bits_per_byte']:.4f}"]),
            f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "",
            duration(run.seconds),
        )
    # A file or a pipe has no width to break lines at.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for result in results:
        if result.diverged:
            print(f"{result.variation.name}: {result.diverged}")
