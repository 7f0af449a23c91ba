"""`cs336 report`: one page about one run or several."""

from __future__ import annotations

from pathlib import Path


def report(*runs: Path, out: Path | None = None) -> int:
    """Draw one run, or several side by side, as one self-contained HTML page.

    Parameters
    ----------
    runs
        The folders of the runs, such as runs/quickstart.
    out
        The page to write; by default report.html in the run's folder, or comparison.html beside the first run.
    """
    from ..pipeline import report as pages

    if not runs:
        raise ValueError("name at least one run's folder, such as runs/quickstart")
    target = out or (runs[0] / "report.html" if len(runs) == 1 else runs[0].parent / "comparison.html")
    print(pages.write(runs, target))
    return 0
