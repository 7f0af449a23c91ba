"""`cs336 doctor`: what would go wrong, before it does."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

COLORS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}


def doctor(
    config: str | None = None,
    /,
    *,
    set: Annotated[Sequence[str], Parameter(negative=())] = (),
    out: Path | None = None,
    canary: bool = True,
    canary_seconds: float = 180.0,
    json: bool = False,
) -> int:
    """Hold this machine against a configuration and say what to do.

    Looks at versions, devices, cores, memory, disk, environment variables, plugins and data, and lets torch.compile
    compile a tiny training step, which must agree with the same step not compiled. The exit status is 1 where something
    would fail.

    Examples: `cs336 doctor`, `cs336 doctor tinystories_17m --set training.batch_size=64`.

    Parameters
    ----------
    config
        A TOML file, or the name of a shipped configuration; without it, only the machine is looked at.
    set
        Changes one value of the configuration, such as training.batch_size=64; may be given several times.
    out
        The folder that the run would be in; by default runs/NAME.
    canary
        --no-canary leaves torch.compile out.
    canary_seconds
        How long compiling may take.
    json
        Print one JSON array of findings.
    """
    from ..pipeline.configuration import load
    from ..pipeline.doctor import examine

    configuration = load(config, set) if config is not None else None
    found = []
    console = None
    if not json:
        from rich.console import Console

        console = Console(highlight=False)
    for finding in examine(configuration, out=out, canary_seconds=canary_seconds if canary else 0.0):
        found.append(finding)
        if console is not None:
            console.print(f"[{COLORS[finding.level]}]{finding.level:<8}[/]", end=" ")
            console.print(f"{finding.subject}: {finding.found}", markup=False, soft_wrap=True)
            if finding.advice and finding.level != "ok":
                console.print(f"         -> {finding.advice}", markup=False, soft_wrap=True, style="dim")
    problems = [finding for finding in found if finding.level == "problem"]
    if json:
        print(json_module.dumps([finding.to_dict() for finding in found], indent=2, ensure_ascii=False))
    elif console is not None:
        subject = f"for {config}" if config else "here"
        verdict = f"{len(problems)} would fail {subject}" if problems else f"nothing stands in the way {subject}"
        console.print(f"\n{verdict}", style="bold")
    return 1 if problems else 0
