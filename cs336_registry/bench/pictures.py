"""Pictures of result rows, as SVG text: bars per component with the limit line, speed against size, memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from .rows import latest

COLORS = {
    "reference": "#8a8f98",
    "torch": "#e4572e",
    "triton": "#17a398",
    "heap_bpe": "#e9a820",
    "numba_bpe": "#3d6fd9",
}
OTHERS = ("#9b5de5", "#c9184a", "#577590", "#606c38", "#bc6c25", "#00a5cf")


def color(backend: str, others: list[str]) -> str:
    """A backend's own colour, the same in every picture."""
    if backend in COLORS:
        return COLORS[backend]
    if backend not in others:
        others.append(backend)
    return OTHERS[others.index(backend) % len(OTHERS)]


def shares(rows: Sequence[dict[str, Any]], title: str) -> str | None:
    """Share of the machine's limit per component and backend, largest workload of each; the line is the limit."""
    newest = latest((row for row in rows if row.get("share_of_limit")), "component", "workload", "backend", "direction")
    if not newest:
        return None
    largest = {row["component"]: row["workload"] for row in newest}
    shown = [row for row in newest if row["workload"] == largest[row["component"]]]
    labels = list(dict.fromkeys(f"{row['component']}\n{row['direction']}" for row in shown))
    backends = list(dict.fromkeys(row["backend"] for row in shown))
    figure, axes = _axes(max(7.0, 0.55 * len(labels) * max(len(backends), 2) / 2), 3.6)
    others: list[str] = []
    width = 0.8 / len(backends)
    for offset, backend in enumerate(backends):
        rows_of = {f"{r['component']}\n{r['direction']}": r for r in shown if r["backend"] == backend}
        places = [
            index + (offset - (len(backends) - 1) / 2) * width for index, label in enumerate(labels) if label in rows_of
        ]
        heights = [100 * rows_of[label]["share_of_limit"] for label in labels if label in rows_of]
        axes.bar(places, heights, width, label=backend, color=color(backend, others))
    axes.axhline(100, color="#888888", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=0 if len(labels) < 9 else 60)
    axes.set_ylabel("% of the limit that binds")
    return _finish(figure, axes, title)


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
    labels = list(dict.fromkeys(f"{row['component']} {row['workload']}" for row in points))
    figure, axes = _axes(7.5, 0.9 + 0.26 * len(labels))
    others: list[str] = []
    for backend in dict.fromkeys(row["backend"] for row in points):
        mine = [row for row in points if row["backend"] == backend]
        speeds = [base[row["component"], row["workload"], row["dtype"]] / row["seconds"] for row in mine]
        places = [labels.index(f"{row['component']} {row['workload']}") for row in mine]
        axes.scatter(speeds, places, s=34, label=backend, color=color(backend, others), zorder=3)
    axes.axvline(1, color="#888888", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda _value, _place: "")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"times faster than {reference}")
    return _finish(figure, axes, title)


def growth(rows: Sequence[dict[str, Any]], x: str, y: str, title: str, labels: tuple[str, str]) -> str | None:
    """`y` against `x` for every backend (seconds or bytes of memory against the input's size), both logarithmic."""
    newest = latest((row for row in rows if row.get(x) and row.get(y)), "backend", x)
    if not newest:
        return None
    figure, axes = _axes(6.5, 3.8)
    others: list[str] = []
    for backend in dict.fromkeys(row["backend"] for row in newest):
        points = sorted((row[x], row[y]) for row in newest if row["backend"] == backend)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=backend, color=color(backend, others))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return _finish(figure, axes, title)


def _axes(width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 16.0), height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, linewidth=0.4, alpha=0.5, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure, axes, title: str) -> str:
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
