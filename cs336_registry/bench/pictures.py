"""Pictures of result rows, as SVG text: speed against the reference, bars with the limit line, memory, growth."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from .rows import latest

COLORS = {
    "reference": "#8a8f98",
    "torch": "#e4572e",
    "triton": "#17a398",
    "compiled": "#9b5de5",
    "heap_bpe": "#e9a820",
    "numba_bpe": "#3d6fd9",
}
OTHERS = ("#c9184a", "#577590", "#606c38", "#bc6c25", "#00a5cf", "#333333")
WIDTH = 10.5
"""Inches; every picture is as wide, so that the page shows them at one scale."""
Key = Callable[[dict[str, Any]], str]


def ratios(rows: Sequence[dict[str, Any]], title: str, reference: str = "reference") -> str | None:
    """How many times faster than the reference, per component and workload, on a logarithmic axis."""
    newest = latest(
        (row for row in rows if row.get("seconds")), "component", "workload", "backend", "direction", "dtype"
    )
    chosen = [row for row in newest if row["direction"] in ("both", "forward")]
    both = {(row["component"], row["workload"]) for row in chosen if row["direction"] == "both"}
    chosen = [r for r in chosen if r["direction"] == "both" or (r["component"], r["workload"]) not in both]
    base = {(r["component"], r["workload"], r["dtype"]): r["seconds"] for r in chosen if r["backend"] == reference}
    points = [r for r in chosen if r["backend"] != reference and (r["component"], r["workload"], r["dtype"]) in base]
    if not points:
        return None
    labels = list(dict.fromkeys(map(_work, points)))
    figure, (axes,) = _figure(0.9 + 0.27 * len(labels))
    colors = _colors(points)
    for backend, color in colors.items():
        mine = [row for row in points if row["backend"] == backend]
        speeds = [base[row["component"], row["workload"], row["dtype"]] / row["seconds"] for row in mine]
        axes.scatter(speeds, [labels.index(_work(row)) for row in mine], s=42, label=backend, color=color, zorder=3)
    axes.axvline(1, color="#555555", linewidth=1, linestyle="--")
    _logarithmic(axes.xaxis, "{:g}x".format)
    _rows(axes, labels)
    axes.set_xlabel(f"times as fast as {reference} (dashed: the same speed)")
    return _finish(figure, axes, title)


def shares(rows: Sequence[dict[str, Any]], title: str) -> str | None:
    """Share of the machine's limit per component and backend, last workload of each; the line is the limit."""
    newest = latest((row for row in rows if row.get("share_of_limit")), "component", "workload", "backend", "direction")
    if not newest:
        return None
    last = {row["component"]: row["workload"] for row in newest}
    shown = [row for row in newest if row["workload"] == last[row["component"]]]
    directions = [name for name in ("forward", "backward", "both") if any(r["direction"] == name for r in shown)]
    labels = list(dict.fromkeys(map(_work, shown)))
    colors = _colors(shown)
    figure, panels = _figure(1.1 + 0.17 * len(labels) * (len(colors) + 1), len(directions))
    for axes, direction in zip(panels, directions, strict=True):
        mine = [row for row in shown if row["direction"] == direction]
        _bars(axes, mine, labels, colors, lambda row: 100 * row["share_of_limit"])
        axes.axvline(100, color="#555555", linewidth=1, linestyle="--")
        axes.set_xlabel(f"{direction}: % of the limit that binds")
    return _finish(figure, panels[0], title)


def memory(rows: Sequence[dict[str, Any]], title: str) -> str | None:
    """Peak memory of the process per component and backend, last workload of each."""
    newest = latest((row for row in rows if row.get("peak_memory")), "component", "workload", "backend")
    if not newest:
        return None
    last = {row["component"]: row["workload"] for row in newest}
    shown = [row for row in newest if row["workload"] == last[row["component"]]]
    labels = list(dict.fromkeys(map(_work, shown)))
    colors = _colors(shown)
    figure, (axes,) = _figure(1.1 + 0.15 * len(labels) * (len(colors) + 1))
    _bars(axes, shown, labels, colors, lambda row: row["peak_memory"] / 1e6)
    axes.set_xlabel("peak memory in MB (of the whole process on a CPU, inputs included)")
    return _finish(figure, axes, title)


def growth(rows: Sequence[dict[str, Any]], y: str, title: str, label: str, scale: float = 1.0) -> str | None:
    """`y` divided by `scale` against the input's size for every backend, both logarithmic, a panel for each corpus."""
    shown = latest((row for row in rows if row.get("bytes") and row.get(y)), "corpus", "bytes", "vocab_size", "backend")
    if not shown:
        return None
    corpora = list(dict.fromkeys(map(_corpus, shown)))
    figure, panels = _figure(4.0, len(corpora))
    for axes, corpus in zip(panels, corpora, strict=True):
        for backend, color in _colors(shown).items():
            mine = [row for row in shown if row["backend"] == backend and _corpus(row) == corpus]
            points = sorted((row["bytes"] / 1e6, row[y] / scale) for row in mine)
            axes.plot(
                [x for x, _ in points],
                [found for _, found in points],
                marker="o",
                markersize=5,
                label=backend,
                color=color,
            )
        for axis in (axes.xaxis, axes.yaxis):
            _logarithmic(axis, "{:g}".format)
        axes.set_xlabel(f"{corpus}: text in MB")
    panels[0].set_ylabel(label)
    return _finish(figure, panels[0], title)


def _corpus(row: dict[str, Any]) -> str:
    """What a panel shows: a text, of which several sizes may have been taken, and one size of vocabulary."""
    return f"{row.get('text', row['corpus'])}, vocabulary of {row['vocab_size']:,}"


def _work(row: dict[str, Any]) -> str:
    return f"{row['component']} {row['workload']}"


def _colors(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A backend's own colour, the same in every picture of a page; the reference first."""
    backends = sorted({row["backend"] for row in rows}, key=lambda name: (name != "reference", name))
    others = [name for name in backends if name not in COLORS]
    return {name: COLORS.get(name) or OTHERS[others.index(name) % len(OTHERS)] for name in backends}


def _bars(axes, rows: Sequence[dict[str, Any]], labels: list[str], colors: dict[str, str], value) -> None:
    """Horizontal bars, grouped by label around its tick; a backend that was not measured there takes no place."""
    measured = {label: [name for name in colors if any(_is(row, name, label) for row in rows)] for label in labels}
    height = 0.8 / max(1, *map(len, measured.values()))
    for backend, color in colors.items():
        mine = [row for row in rows if row["backend"] == backend]
        offsets = [measured[_work(row)].index(backend) + 0.5 - len(measured[_work(row)]) / 2 for row in mine]
        places = [labels.index(_work(row)) + offset * height for row, offset in zip(mine, offsets, strict=True)]
        axes.barh(places, [value(row) for row in mine], height, label=backend, color=color, zorder=2)
    _rows(axes, labels)


def _is(row: dict[str, Any], backend: str, label: str) -> bool:
    return row["backend"] == backend and _work(row) == label


def _rows(axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def _logarithmic(axis, text: Callable[[float], str]) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _place: text(value))
    axis.set_minor_formatter(NullFormatter())


def _figure(height: float, panels: int = 1):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    found = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axes in found:
        axes.grid(True, linewidth=0.4, alpha=0.5, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, found


def _finish(figure, axes, title: str) -> str:
    from matplotlib import rc_context

    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=7, fontsize=9, frameon=False)
    text = io.StringIO()
    # The same rows draw the same bytes.
    with rc_context({"svg.hashsalt": "cs336_registry"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
