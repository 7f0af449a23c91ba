"""`cs336 train`: a configured run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def train(
    config: str,
    /,
    *,
    set: Annotated[Sequence[str], Parameter(negative=())] = (),
    out: Path | None = None,
    resume: bool = True,
    backend: str | None = None,
    print: bool = False,
    quiet: bool = False,
) -> int:
    """Train as a configuration says, and continue after any interruption.

    Examples: `cs336 train tinystories_17m --set optimizer.lr=3e-4`, `cs336 train my.toml --backend triton`. Several
    processes: `torchrun --nproc-per-node 2 -m cs336_registry.cli train my.toml --set parallel.strategy=fsdp`; the
    number of processes and the strategy may change between two starts of a run.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration: gpt2_124m, quickstart, tinystories_17m, tinystories_cpu
        (to begin a file of your own, --print one of these).
    set
        Changes one value, such as optimizer.lr=3e-4; may be given several times.
    out
        The run's folder; by default runs/NAME.
    resume
        Continue the run that is in the folder; --no-resume refuses to.
    backend
        A selector such as "triton,adamw=torch".
    print
        Write the configuration with every value as TOML to standard output, and train nothing.
    quiet
        Print nothing.
    """
    from ..pipeline.one_voice import one_voice

    with one_voice():
        from ..pipeline.configuration import load

        settings = [*set, *([f"backend={backend}"] if backend is not None else [])]
        configuration = load(config, settings)
        if print:
            sys.stdout.write(configuration.to_toml())
            return 0
        from ..pipeline import report, training
        from ..pipeline.process_group import joined
        from ..pipeline.progress import Progress
        from ..pipeline.run_folder import RunFolder

        out = out or Path("runs") / configuration.name
        progress = Progress(quiet=quiet)
        with joined(configuration.training.device, configuration.parallel.timeout) as group:
            training.train(configuration, out, resume=resume, progress=progress)
        if group.first:
            page = report.write([out], RunFolder(out).report)
            progress.say(f"the report is {page}")
    return 0
