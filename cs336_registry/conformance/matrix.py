"""The grid of backend x component: what is claimed, what was proven, and how fast it is, as rows and as Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from .. import registry
from ..bench.rows import environment, latest


def proven_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Result rows, one per backend and component, from the record of a conformance session."""
    outcomes: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    dtypes: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for check in record.get("checks", ()):
        key = (check["backend"], check["component"], check["device"])
        outcomes[key][check["outcome"]] += 1
        if check["outcome"] == "passed" and check.get("dtype"):
            dtypes[key].add(check["dtype"])
    return [
        {
            "benchmark": "conformance",
            "backend": backend,
            "component": component,
            "device": device,
            "outcomes": dict(sorted(counts.items())),
            "dtypes": sorted(dtypes[backend, component, device]),
            "seed": record["seed"],
            "versions": record["versions"],
            **environment(device),
        }
        for (backend, component, device), counts in sorted(outcomes.items())
    ]


def grid(rows: Sequence[dict[str, Any]]) -> str:
    """Component x backend in Markdown: checks passed, dtypes, and the speed against the reference in the same run."""
    proofs = latest((r for r in rows if r.get("benchmark") == "conformance"), "backend", "component", "device")
    speeds = _speeds(rows)
    backends = [name for name, status in registry.backends().items() if status.backend is not None]
    backends.sort(key=lambda name: (name != "reference", name))
    lines = [f"| component | {' | '.join(backends)} |", "|---|" + "---|" * len(backends)]
    for component in registry.components():
        cells = [_cell(component, backend, proofs, speeds) for backend in backends]
        lines.append(f"| {component} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(
    component: str, backend: str, proofs: Sequence[dict[str, Any]], speeds: dict[tuple[str, str, str], float]
) -> str:
    mine = [row for row in proofs if (row["backend"], row["component"]) == (backend, component)]
    manifest = registry.backends()[backend].backend
    claimed = manifest is not None and manifest.implementation(component) is not None
    if not mine:
        return "claimed, not proven" if claimed else ""
    parts = []
    for row in mine:
        passed, failed = row["outcomes"].get("passed", 0), row["outcomes"].get("failed", 0)
        if not passed and not failed:
            continue
        verdict = f"{failed} of {passed + failed} failed" if failed else f"{passed} passed"
        speed = speeds.get((component, backend, row["device"]))
        ratio = f", {speed:.1f}x" if speed is not None and backend != "reference" else ""
        parts.append(f"{row['device']}: {verdict}{_short(row['dtypes'])}{ratio}")
    return "; ".join(parts)


def _speeds(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """(component, backend, device) -> times faster than the reference, at the largest workload measured for both."""
    timed = [row for row in rows if row.get("benchmark") == "component" and row.get("seconds")]
    newest = latest(timed, "component", "workload", "backend", "direction", "dtype", "device")
    base = {_where(row): row["seconds"] for row in newest if row["backend"] == "reference"}
    found: dict[tuple[str, str, str], float] = {}
    for row in sorted(newest, key=lambda row: row["direction"] == "both"):
        if _where(row) in base:
            found[row["component"], row["backend"], row["device"]] = base[_where(row)] / row["seconds"]
    return found


def _where(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("component", "workload", "direction", "dtype", "device"))


def _short(dtypes: Sequence[str]) -> str:
    names = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    return f" ({', '.join(names.get(name, name) for name in dtypes)})" if dtypes else ""
