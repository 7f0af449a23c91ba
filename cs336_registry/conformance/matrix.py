"""The grid of component x backend: what is claimed, what was proven, and how fast it is, as rows and as Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from .. import registry
from ..bench.rows import environment, latest
from ..plugin import OWN_DISTRIBUTION

SHORT = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def proven_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Result rows, one per backend and component that it provides, from the record of a conformance session."""
    judged: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for check in record.get("checks", ()):
        if "device" in check:  # a component that the backend does not provide has none
            judged[check["backend"], check["component"], check["device"]].append(check)
    return [
        {
            "benchmark": "conformance",
            "backend": backend,
            "component": component,
            "device": device,
            "outcomes": dict(sorted(Counter(check["outcome"] for check in checks).items())),
            "dtypes": sorted({check["dtype"] for check in checks if check["outcome"] == "passed" and check["dtype"]}),
            "failed": sorted(check["check"] for check in checks if check["outcome"] == "failed"),
            "unclaimed": sorted({reason for check in checks for reason in check["unclaimed"]}),
            "seed": record["seed"],
            "seeds": record["seeds"],
            "versions": record["versions"],
            **environment(device),
        }
        for (backend, component, device), checks in sorted(judged.items())
    ]


def grid(rows: Sequence[dict[str, Any]], *, own: bool = False) -> str:
    """Component x backend in Markdown: checks passed, dtypes, and the speed against the reference in the same run.

    own: only the backends of this distribution, so that the table is the same on every machine.
    """
    proofs: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in latest((r for r in rows if r.get("benchmark") == "conformance"), "backend", "component", "device"):
        proofs[row["component"], row["backend"]].append(row)
    speeds = _speeds(rows)
    backends = _backends(own)
    lines = [f"| component | {' | '.join(backends)} |", "|---|" + "---|" * len(backends)]
    for component in registry.components():
        cells = [_cell(component, backend, proofs[component, backend], speeds) for backend in backends]
        lines.append(f"| {component} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shortfalls(rows: Sequence[dict[str, Any]], *, own: bool = False) -> str:
    """Backend by backend, what the contracts ask for and it does not claim or does not pass, in Markdown."""
    proofs = latest((r for r in rows if r.get("benchmark") == "conformance"), "backend", "component", "device")
    lines = []
    for backend in _backends(own):
        reasons: dict[str, list[str]] = defaultdict(list)
        for row in (row for row in proofs if row["backend"] == backend):
            for reason in row["unclaimed"]:
                reasons[reason.partition(": convert,")[0]].append(row["component"])
            if row["failed"]:
                reasons[f"fails {', '.join(row['failed'])}"].append(row["component"])
        lines += [f"| {backend} | {', '.join(names)} | {reason} |" for reason, names in sorted(reasons.items())]
    return "\n".join(["| backend | components | why a check was not asked, or failed |", "|---|---|---|", *lines])


def _backends(own: bool) -> list[str]:
    """Backends with a manifest, available here or not, the reference first."""
    listed = [
        name
        for name, status in registry.backends().items()
        if status.backend is not None and (status.distribution == OWN_DISTRIBUTION or not own)
    ]
    return sorted(listed, key=lambda name: (name != registry.DEFAULT_BACKEND, name))


def _cell(
    component: str,
    backend: str,
    proofs: Sequence[dict[str, Any]],
    speeds: dict[tuple[str, str, str], float],
) -> str:
    if not proofs:
        manifest = registry.backends()[backend].backend
        claimed = manifest is not None and manifest.implementation(component) is not None
        return "claimed, not proven" if claimed else ""
    parts = []
    for row in proofs:
        passed, failed = row["outcomes"].get("passed", 0), row["outcomes"].get("failed", 0)
        if not passed and not failed:
            continue
        verdict = f"{failed} of {passed + failed} failed" if failed else f"{passed} passed"
        names: list[str] = row["dtypes"]
        dtypes = f" ({', '.join(SHORT.get(name, name) for name in names)})" if names else ""
        speed = speeds.get((component, backend, row["device"]))
        ratio = ""
        if speed is not None and backend != registry.DEFAULT_BACKEND:
            decimals = 0 if speed >= 10 else 1 if speed >= 0.1 else 2
            ratio = f", **{speed:.{decimals}f}x**"
        parts.append(f"{row['device']}: {verdict}{dtypes}{ratio}")
    return "; ".join(parts)


def _speeds(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """(component, backend, device) -> times as fast as the reference at the last workload that was measured for both,
    forward and backward where there is a backward pass.
    """
    timed = [row for row in rows if row.get("benchmark") == "component" and row.get("seconds")]
    newest = latest(timed, "component", "workload", "backend", "direction", "dtype", "device")
    base = {_where(row): row["seconds"] for row in newest if row["backend"] == registry.DEFAULT_BACKEND}
    found: dict[tuple[str, str, str], float] = {}
    for row in sorted(newest, key=lambda row: row["direction"] == "both"):
        if _where(row) in base:
            found[row["component"], row["backend"], row["device"]] = base[_where(row)] / row["seconds"]
    return found


def _where(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("component", "workload", "direction", "dtype", "device"))
