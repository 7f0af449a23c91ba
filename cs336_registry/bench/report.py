"""One self-contained HTML page over the result rows: pictures first, then every row, the losing ones too."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from . import pictures
from .rows import latest
from .tables import duration

HEADS = ("what", "workload", "backend", "dtype", "direction", "median", "quartiles", "share", "peak memory", "commit")
STYLE = """
:root { color-scheme: light dark; --line: #d9dde3; --muted: #667; --card: #fff; --back: #f5f6f8; --text: #16181d }
@media (prefers-color-scheme: dark) {
  :root { --line: #343a46; --muted: #9aa3b2; --card: #1b1f27; --back: #12151b; --text: #e8eaee }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; background: var(--back); color: var(--text) }
main { max-width: 70rem; margin: auto; padding: 2rem 1rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p { color: var(--muted); max-width: 60rem }
figure { margin: 1rem 0; padding: 1rem; background: #fff; border: 1px solid var(--line); border-radius: 8px }
figure svg { max-width: 100%; height: auto }
.rows { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
td.refused { color: #c9184a; white-space: normal }
"""


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page as HTML. It loads nothing: styles and pictures are inside."""
    measured = [row for row in rows if row["benchmark"] != "conformance"]
    machines = list(dict.fromkeys((row.get("machine", ""), row.get("device", "cpu")) for row in measured))
    parts = [
        "<h1>cs336_registry benchmarks</h1>",
        f"<p>{len(measured)} rows from {len(machines)} machine(s). A component's speed stands here only where the same "
        "process first passed the contract's checks. Medians of interleaved rounds; compare figures of one run.</p>",
    ]
    for machine, device in machines:
        mine = [row for row in measured if (row.get("machine", ""), row.get("device", "cpu")) == (machine, device)]
        parts.append(f"<h2>{html.escape(machine or 'unknown machine')} ({html.escape(device)})</h2>")
        parts += [f"<figure>{picture}</figure>" for picture in _pictures(mine) if picture]
        parts.append(_table(mine))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>cs336_registry benchmarks</title><link rel=icon href='data:,'><style>{STYLE}</style>"
        f"<main>{''.join(parts)}</main></html>"
    )


def _pictures(rows: Sequence[dict[str, Any]]) -> list[str | None]:
    components = [row for row in rows if row["benchmark"] == "component"]
    training = [row for row in rows if row["benchmark"] == "bpe_training"]
    return [
        pictures.ratios(components, "Speed against the reference (forward and backward where there is one)"),
        pictures.shares(components, "Share of the machine's limit (copying memory or multiplying matrices)"),
        pictures.memory(components, "Peak memory"),
        *pictures.growth(training, "BPE training"),
        pictures.encoding(rows, "Encoding held-out text, each library's fastest entry point"),
    ]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    newest = latest(
        rows, "benchmark", "component", "workload", "backend", "direction", "dtype", "corpus", "vocab_size", "mode"
    )
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in newest)
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    return f"<div class=rows><table><tr>{heads}</tr>{body}</table></div>"


def _cells(row: dict[str, Any]) -> str:
    what = row.get("component") or row.get("benchmark", "")
    size = row.get("workload") or " ".join(str(row[key]) for key in ("corpus", "vocab_size", "mode") if row.get(key))
    first = [what, size, row.get("backend", ""), row.get("dtype") or "", row.get("direction") or ""]
    cells = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in first)
    if refused := row.get("refused") or row.get("error"):
        return f"{cells}<td class=refused colspan=5>no speed: {html.escape(refused[:300])}</td>"
    spread = f"{duration(row['seconds_low'])} to {duration(row['seconds_high'])}" if row.get("seconds_low") else ""
    share = f"{100 * row['share_of_limit']:.1f} % of {row['limit']}" if row.get("share_of_limit") else ""
    memory = f"{row['peak_memory'] / 1e6:.0f} MB" if row.get("peak_memory") else ""
    rest = [duration(row["seconds"]) if row.get("seconds") else "", spread, share, memory, row.get("commit", "")]
    return cells + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in rest)
