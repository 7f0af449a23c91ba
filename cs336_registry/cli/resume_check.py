"""`cs336 resume-check`: the proof that interruptions cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def resume_check(
    config: str = "quickstart",
    /,
    *,
    set: Annotated[Sequence[str], Parameter(negative=(), show_default=False)] = (),
    steps: int = 60,
    kills: int = 3,
    seed: int | None = None,
    out: Path = Path("runs/resume-check"),
    backend: str | None = None,
    quiet: bool = False,
) -> int:
    """Prove that a run killed at random steps ends with the losses and weights of one left alone.

    The configuration is trained for a few steps twice, each time by processes of their own: once undisturbed, once
    killed (SIGKILL, as by `kill -9` or the out-of-memory killer) and started again. Then every loss, gradient norm,
    evaluation, sample, weight and optimizer state is compared, bit for bit. That is promised on the CPU, with the same
    number of threads; a GPU's sums may be in another order each time.

    Exit code 0: exact. 1: not exact, with the first differences, or a run failed.

    Examples: `cs336 resume-check`, `cs336 resume-check my.toml --backend my_backend --kills 10 --steps 200`.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration.
    set
        Changes one value, such as model.num_layers=2; may be given several times.
    steps
        Optimizer steps of each run, with a checkpoint after every tenth of them; the learning rates are those of the
        whole run's first steps.
    kills
        How often the second run is killed.
    seed
        Decides the steps; drawn by default, and always printed.
    out
        The folder of both runs (whole, killed), which are begun anew.
    backend
        A selector for the components, such as the backend that you wrote.
    quiet
        Print the verdict alone.
    """
    import secrets

    from ..pipeline import resume_check as checking
    from ..pipeline.progress import Progress

    if kills < 1:
        raise ValueError(f"--kills is {kills}: it must be at least 1")
    settings = [*set, *([f"backend={backend}"] if backend is not None else [])]
    configuration = checking.short(config, steps, settings)
    drawn = secrets.randbelow(10**6) if seed is None else seed
    verdict = checking.check(configuration, out, kills=kills, seed=drawn, progress=Progress(quiet=quiet))
    print("\n".join(checking.describe(verdict)))
    return 0 if verdict.comparison.equal else 1
