"""Tables rendered from committed rows into Markdown files, between markers, so that prose and figures can't drift
apart.

A file says `<!-- rows: NAME -->` ... `<!-- end rows -->`; what stands between is replaced. CI runs `cs336 bench tables
--check`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .rows import latest

_MARKED = re.compile(r"(<!-- rows: (?P<name>[a-z_]+) -->\n).*?(<!-- end rows -->)", re.DOTALL)


def rendered(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """`text` with every marked table rendered anew. Raises ValueError for a marker that names no table."""

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r} in a rows marker: known are {', '.join(sorted(TABLES))}")
        return f"{match[1]}{TABLES[name](rows)}\n{match[3]}"

    return _MARKED.sub(table, text)


def stale(path: Path, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the tables in the file at `path` differ from what the rows say.

    Raises FileNotFoundError or ValueError where there is no file, or no table in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: go to a clone of the repository, or name one with --files")
    text = path.read_text(encoding="utf-8")
    if not _MARKED.search(text):
        raise ValueError(
            f"{path} has no table: go to a clone of the repository, or mark where one goes with <!-- rows: NAME --> "
            f"and <!-- end rows -->; NAME is one of {', '.join(sorted(TABLES))}"
        )
    return rendered(text, rows) != text


def component_speeds(rows: Sequence[dict[str, Any]]) -> str:
    """Component x backend: median seconds and the ratio to the reference in the same run."""
    chosen = [row for row in rows if row.get("benchmark") == "component" and row.get("seconds")]
    newest = latest(chosen, "component", "workload", "backend", "direction", "dtype", "device")
    preferred = [row for row in newest if row["direction"] == "both"]
    covered = {(row["component"], row["workload"], row["device"]) for row in preferred}
    newest = preferred + [
        r for r in newest if r["direction"] == "forward" and (r["component"], r["workload"], r["device"]) not in covered
    ]
    backends = list(dict.fromkeys(row["backend"] for row in newest))
    lines = [
        f"| component | workload | device, dtype | {' | '.join(backends)} |",
        "|---|---|---|" + "---|" * len(backends),
    ]
    groups = dict.fromkeys((row["component"], row["workload"], row["device"], row["dtype"]) for row in newest)
    for group in sorted(groups, key=str):
        mine = {
            row["backend"]: row
            for row in newest
            if (row["component"], row["workload"], row["device"], row["dtype"]) == group
        }
        base = mine.get("reference")
        cells = [_speed(mine.get(backend), base) for backend in backends]
        component, workload, device, dtype = group
        lines.append(f"| {component} | {workload} | {device}{', ' + dtype if dtype else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bpe_training(rows: Sequence[dict[str, Any]]) -> str:
    """Corpus and vocabulary x library: process wall seconds, times slower than ours, and peak memory."""
    mine = [row for row in rows if row.get("benchmark") == "bpe_training"]
    mine.sort(key=lambda row: (row.get("text", row["corpus"]), row["vocab_size"], row.get("bytes", 0)))
    return _contenders(mine, ("corpus", "vocab_size"))


def encoding(rows: Sequence[dict[str, Any]]) -> str:
    """Corpus and mode x library: MB/s and peak memory of its fastest entry point, and how much faster ours is."""
    fastest = fastest_encoders(rows)
    libraries = list(dict.fromkeys(library for mine in fastest.values() for library in mine))
    libraries.sort(key=lambda library: library != "numba_bpe")
    lines = [f"| corpus | mode | {' | '.join(libraries)} |", "|" + "---|" * (len(libraries) + 2)]
    for (corpus, mode), mine in fastest.items():
        cells = [_encoding_speed(mine.get(library), mine.get("numba_bpe")) for library in libraries]
        lines.append(f"| {corpus} | {mode} | {' | '.join(cells)} |")
    return "\n".join(lines)


GPU_PEERS = {
    "PyTorch": ("torch", "torch_fused"),
    "torch.compile": ("torch_compile_of_reference",),
    "Liger": ("liger",),
    "quack": ("quack",),
    "SDPA": ("sdpa_default",),
    "cuDNN": ("sdpa_cudnn",),
    "FlashAttention-2": ("sdpa_flash",),
    "FlashAttention-4": ("flash_attention_4",),
}


def gpu_ops(rows: Sequence[dict[str, Any]]) -> str:
    """Op, size and direction: the Triton kernels' time, share of the card's limit, and how much longer others took in
    the same run."""
    chosen = [row for row in rows if row.get("benchmark") == "triton_ops" and row.get("seconds")]
    found = _newest_runs(chosen, "component", "workload", "direction", "dtype", "machine")
    lines = [
        f"| op | size | direction | Triton | of the card's limit | {' | '.join(GPU_PEERS)} |",
        "|---|---|---|---|---|" + "---|" * len(GPU_PEERS),
    ]
    order = {"forward": 0, "backward": 1, "both": 2}
    for group in sorted(found, key=lambda key: (key[0], key[1], order[key[2]])):
        own = found[group].pop("triton", None)
        if own is None:
            continue
        component, workload, direction, dtype, _ = group
        rate = f", {own['flops_per_second'] / 1e12:.0f} TFLOP/s" if own["limit"] == "matmul" else ""
        cells = [
            _times(own, next((found[group][name] for name in names if name in found[group]), None))
            for names in GPU_PEERS.values()
        ]
        share = f"{own['share_of_limit']:.0%} of {own['limit']}{rate}"
        size = workload + f", {dtype}" * (dtype != "bfloat16") + ", called" * (own.get("timing") != "graph")
        lines.append(
            f"| {component} | {size} | {direction} | {duration(own['seconds'])} | {share} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _newest_runs(rows: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """For every combination of `keys` the last run's rows by backend; a run is known by its commit."""
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        run = found.setdefault(tuple(row.get(key) for key in keys), {})
        if any(other["commit"] != row["commit"] for other in run.values()):
            run.clear()
        run[row["backend"]] = row
    return found


def _times(own: dict[str, Any], other: dict[str, Any] | None) -> str:
    return "" if other is None else f"{other['seconds'] / own['seconds']:.2f}x"


def gpu_steps(rows: Sequence[dict[str, Any]]) -> str:
    """One training step on a GPU, contender by contender of one run: tokens per second, share of the matrix limit,
    memory."""
    chosen = [
        row
        for row in rows
        if row.get("benchmark") == "training_step" and row.get("device") == "cuda" and row.get("seconds")
    ]
    lines = [
        "| model x sequences | contender | tokens/s | model FLOP/s of the matrix limit | peak memory | commit |",
        "|---|---|---|---|---|---|",
    ]
    for (workload, *_), mine in _newest_runs(chosen, "workload", "dtype", "machine").items():
        for row in sorted(mine.values(), key=lambda row: row["seconds"]):
            share = row["flops_per_second"] / row["matmul_flops_per_second"]
            lines.append(
                f"| {workload} | `{row['backend']}` | {row['tokens_per_second']:,.0f} | {share:.1%} |"
                f" {row['peak_memory'] / 1e9:.1f} GB | {row['commit']} |"
            )
    return "\n".join(lines)


def fastest_encoders(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """For each corpus and mode, the row of each library's fastest entry point."""
    chosen = (row for row in rows if row.get("benchmark") == "encoding" and row.get("seconds"))
    fastest: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in latest(chosen, "corpus", "mode", "backend"):
        mine = fastest.setdefault((row["corpus"], row["mode"]), {})
        library = row["backend"] if row["backend"] == "numba_bpe" else row["backend"].partition("_")[0]
        if library not in mine or row["seconds"] < mine[library]["seconds"]:
            mine[library] = row
    return fastest


def _encoding_speed(row: dict[str, Any] | None, own: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    ratio = "" if own is None or row is own else f" ({row['seconds'] / own['seconds']:.2f}x)"
    differ = "" if "NOT" not in str(row.get("result", "")) else f", {row['result']}"
    return f"{row['megabytes_per_second']:.3g} MB/s{ratio}, {row['peak_memory'] / 1e6:.0f} MB{differ}"


def _contenders(rows: Sequence[dict[str, Any]], keys: tuple[str, ...]) -> str:
    newest = latest((row for row in rows if row.get("seconds")), *keys, "backend")
    lines = [
        f"| {' | '.join(keys)} | library | seconds | times numba_bpe | peak memory | result |",
        "|" + "---|" * (len(keys) + 5),
    ]
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in newest):
        mine = sorted((r for r in newest if tuple(r[k] for k in keys) == group), key=lambda row: row["seconds"])
        base = next((row["seconds"] for row in mine if row["backend"] == "numba_bpe"), None)
        for row in mine:
            own = row.get("numba_bpe_seconds") or base  # a row's own run, where it was measured in another one
            ratio = f"{row['seconds'] / own:.2f}" if own else ""
            memory = f"{row['peak_memory'] / 1e6:.0f} MB" if row.get("peak_memory") else ""
            cells = [
                *map(str, group),
                row["backend"],
                f"{row['seconds']:.2f}",
                ratio,
                memory,
                str(row.get("result", "")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _speed(row: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    text = duration(row["seconds"])
    return text if base is None or row is base else f"{text} ({base['seconds'] / row['seconds']:.2f}x)"


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def grid(rows: Sequence[dict[str, Any]]) -> str:
    """Component x backend: what was proven, in which dtypes, how fast."""
    from ..conformance.matrix import grid

    return grid(rows, own=True)


def shortfalls(rows: Sequence[dict[str, Any]]) -> str:
    """Backend by backend, what it does not claim or does not pass, and why."""
    from ..conformance.matrix import shortfalls

    return shortfalls(rows, own=True)


TABLES: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "grid": grid,
    "shortfalls": shortfalls,
    "component_speeds": component_speeds,
    "bpe_training": bpe_training,
    "encoding": encoding,
    "gpu_ops": gpu_ops,
    "gpu_steps": gpu_steps,
}
