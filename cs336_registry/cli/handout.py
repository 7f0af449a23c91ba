"""`cs336 handout`: everything that the course asks for, on one page."""

from __future__ import annotations

from pathlib import Path


def handout(
    config: str = "quickstart", /, *, out: Path = Path("runs/handout"), full: bool = False, quiet: bool = False
) -> int:
    """Make the course's deliverables that fit this machine, on one page, each with its command.

    Tokenizer experiments, accounting, learning-rate and batch-size sweeps, ablations, generation, experiment log: by
    default with tiny models, in minutes. Interrupted, the same command continues.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration.
    out
        The folder of the runs and of handout.html.
    full
        Take the configuration as it is, with more points on each sweep: hours on a CPU.
    quiet
        Print nothing.
    """
    from ..pipeline.handout import make
    from ..pipeline.progress import Progress

    make(config, out, full=full, progress=Progress(quiet=quiet))
    return 0
