"""One HTML page about one run or several: no request to anywhere, readable in light and in dark.

write([Path("runs/quickstart")], Path("runs/quickstart/report.html"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from ..text.files import write_text
from ..text.progress import duration
from . import report_sections
from .report_run import Run, read

MOST_NAMES = 4
"""A title has room for this many runs."""


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write the page about `runs` to `out`. Raises FileNotFoundError for a folder without a run."""
    if not runs:
        raise ValueError("there is no run to report on: pass the folder of one or several")
    write_text(out, page([read(path, number) for number, path in enumerate(runs)]))
    return out


def page(runs: Sequence[Run]) -> str:
    """The page as text."""
    single = len(runs) == 1
    title = runs[0].name if single else f"Comparison of {_names(runs)}"
    sections: list[Callable[[Sequence[Run]], str]] = [
        report_sections.tiles if single else report_sections.comparison,
        report_sections.learning,
        report_sections.bits_per_byte,
        report_sections.samples,
        report_sections.tokenizer,
        report_sections.throughput,
        report_sections.decisions,
        report_sections.configuration,
    ]
    style, script = (
        files("cs336_registry.pipeline").joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">',
            f"<title>{escape(title)} · training report</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
            f"<header><h1>{escape(title)}</h1><p>{escape(_subtitle(runs))}</p></header>",
            *(section(runs) for section in sections),
            f"<footer>{escape(_machine(runs[0]))}</footer>\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n",
        ]
    )


def _names(runs: Sequence[Run]) -> str:
    named = ", ".join(run.name for run in runs[:MOST_NAMES])
    return named if len(runs) <= MOST_NAMES else f"{named} and {len(runs) - MOST_NAMES} more"


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs side by side: the same charts, one colour a run."
    run = runs[0]
    source = run.of("corpus").get("source", "")
    trained = f"{run.tokens_trained / 1e6:.2f} M tokens in {duration(run.seconds)}" if run.steps else "no step yet"
    return " · ".join(part for part in (run.configuration["description"], source, trained) if part)


def _machine(run: Run) -> str:
    machine, versions = run.of("machine"), run.of("versions")
    where = machine.get("cuda_devices") or [machine.get("processor", "")]
    memory = f", {machine['memory'] / 2**30:.0f} GiB" if machine.get("memory") else ""
    software = ", ".join(f"{name} {number}" for name, number in versions.items())
    cores = f"{machine.get('cpu_count', '?')} CPU cores"
    return f"{where[0]}, {cores}{memory} · {software} · started {run.record.get('started', '')}"
