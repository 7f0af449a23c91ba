"""Pictures of result rows, as SVG text: speeds, bars with the limit line, memory, growth with the size of the text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .rows import latest
from .tables import fastest_encoders

COLORS = {
    "reference": "#8a8f98",
    "torch": "#e4572e",
    "triton": "#17a398",
    "compiled": "#9b5de5",
    "liger": "#606c38",
    "heap_bpe": "#e9a820",
    "numba_bpe": "#3d6fd9",
    "numba_bpe_smallest_ids": "#9db8f2",
    "gigatoken": "#c9184a",
    "tiktoken": "#1b998b",
    "hf_tokenizers": "#00a5cf",
    "tokenizers": "#00a5cf",
    "rustbpe": "#bc6c25",
    "bpeasy": "#577590",
}
OTHERS = ("#333333", "#7f5539", "#b5179e", "#588157")
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
    figure, (axes,) = _figure(0.9 + 0.27 * len(set(map(_work, points))))
    _dots(axes, points, lambda row: base[row["component"], row["workload"], row["dtype"]] / row["seconds"])
    axes.axvline(1, color="#555555", linewidth=1, linestyle="--")
    _logarithmic(axes.xaxis, "{:g}x".format)
    axes.set_xlabel(f"times as fast as {reference} (dashed: the same speed)")
    return _finish(figure, axes, title)


def encoding(rows: Sequence[dict[str, Any]], title: str) -> str | None:
    """Each library's fastest entry point per text and mode, on a logarithmic axis."""
    fastest = fastest_encoders(rows)
    points = [
        {"component": corpus, "workload": mode, "backend": library, "speed": row["megabytes_per_second"]}
        for (corpus, mode), mine in fastest.items()
        for library, row in mine.items()
    ]
    if not points:
        return None
    figure, (axes,) = _figure(0.9 + 0.27 * len(fastest))
    _dots(axes, points, lambda row: row["speed"])
    _logarithmic(axes.xaxis, "{:g}".format)
    axes.set_xlabel("MB of text per second")
    return _finish(figure, axes, title)


def shares(rows: Sequence[dict[str, Any]], title: str) -> str | None:
    """Share of the machine's limit per component and backend, last workload of each; the line is the limit."""
    newest = latest((row for row in rows if row.get("share_of_limit")), "component", "workload", "backend", "direction")
    if not newest:
        return None
    last = {row["component"]: row["workload"] for row in newest}
    shown = [row for row in newest if row["workload"] == last[row["component"]]]
    directions = [name for name in ("forward", "backward", "both") if any(r["direction"] == name for r in shown)]
    places = _places(shown)
    figure, panels = _figure(1.1 + 0.15 * places.height, len(directions))
    for axes, direction in zip(panels, directions, strict=True):
        mine = [row for row in shown if row["direction"] == direction]
        _bars(axes, mine, places, lambda row: 100 * row["share_of_limit"])
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
    places = _places(shown)
    figure, (axes,) = _figure(1.1 + 0.15 * places.height)
    _bars(axes, shown, places, lambda row: row["peak_memory"] / 1e6)
    axes.set_xlabel("peak memory in MB (of the whole process on a CPU, inputs included)")
    return _finish(figure, axes, title)


def growth(rows: Sequence[dict[str, Any]], title: str) -> list[str]:
    """Time and memory against the size of the text and its unique pretokens, all logarithmic; a picture for each corpus
    and vocabulary that was measured at several sizes."""
    shown = latest((row for row in rows if row.get("seconds")), "corpus", "bytes", "vocab_size", "backend")
    pictures = []
    for corpus in dict.fromkeys(map(_corpus, shown)):
        mine = [row for row in shown if _corpus(row) == corpus]
        sizes = {"text in MB": ("bytes", 1e6), "unique pretokens in thousands": ("unique_pretokens", 1e3)}
        across = {label: size for label, size in sizes.items() if len({row.get(size[0]) for row in mine} - {None}) > 1}
        if not across:
            continue
        figure, panels = _figure(6.4, len(across), 2)
        for across_row, (label, y) in zip(
            panels, {"seconds": ("seconds", 1), "peak memory in MB": ("peak_memory", 1e6)}.items(), strict=True
        ):
            for axes, (name, x) in zip(across_row, across.items(), strict=True):
                _lines(axes, [row for row in mine if row.get(x[0])], x, y)
                axes.set_xlabel(name)
            across_row[0].set_ylabel(label)
        pictures.append(_finish(figure, panels[0][0], f"{title}: {corpus}"))
    return pictures


def _lines(axes, rows: Sequence[dict[str, Any]], x: tuple[str, float], y: tuple[str, float]) -> None:
    """A line for each backend. x, y: what of a row is shown, and in which unit."""
    for backend, color in _colors(rows).items():
        points = sorted((row[x[0]] / x[1], row[y[0]] / y[1]) for row in rows if row["backend"] == backend)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=5, label=backend, color=color)
    for axis in (axes.xaxis, axes.yaxis):
        _logarithmic(axis, "{:g}".format)


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


@dataclass(frozen=True)
class _Places:
    """Where bars stand, each 1 high: a backend that was not measured for a label takes no place there."""

    bars: dict[tuple[str, str], float]
    ticks: dict[str, float]
    height: float


def _places(rows: Sequence[dict[str, Any]]) -> _Places:
    bars, ticks, height = {}, {}, 0.0
    for label in dict.fromkeys(map(_work, rows)):
        measured = list(_colors([row for row in rows if _work(row) == label]))
        bars |= {(label, backend): height + place + 0.5 for place, backend in enumerate(measured)}
        ticks[label] = height + len(measured) / 2
        height += len(measured) + 0.8
    return _Places(bars, ticks, height)


def _bars(axes, rows: Sequence[dict[str, Any]], places: _Places, value: Callable[[dict[str, Any]], float]) -> None:
    for backend, color in _colors(rows).items():
        mine = [row for row in rows if row["backend"] == backend]
        heights = [places.bars[_work(row), backend] for row in mine]
        axes.barh(heights, list(map(value, mine)), 1, label=backend, color=color, zorder=2)
    axes.set_yticks(list(places.ticks.values()), list(places.ticks))
    axes.set_ylim(places.height - 0.4, -0.4)


def _dots(axes, rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> None:
    """A line for each label, a dot on it for each backend."""
    labels = list(dict.fromkeys(map(_work, rows)))
    for backend, color in _colors(rows).items():
        mine = [row for row in rows if row["backend"] == backend]
        places = [labels.index(_work(row)) for row in mine]
        axes.scatter(list(map(value, mine)), places, s=42, label=backend, color=color, zorder=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def _logarithmic(axis, text: Callable[[float], str]) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, in plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _place: text(value))
    axis.set_minor_formatter(NullFormatter())


def _figure(height: float, columns: int = 1, rows: int = 1):
    """A figure and its panels: those of one row, or an array of rows. Panels of a row have one y axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    found = figure.subplots(rows, columns, sharey="row", squeeze=False)
    for axes in found.flat:
        axes.grid(True, linewidth=0.4, alpha=0.5, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, found[0] if rows == 1 else found


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
