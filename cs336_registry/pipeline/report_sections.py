"""The sections of a report, in its order: each is a function from the runs to HTML."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from ..text.progress import duration
from .chart import Series, bar_chart, line_chart, smoothed
from .metrics import of_kind
from .report_run import Run


def tiles(runs: Sequence[Run]) -> str:
    """The run in six numbers: (what, how much, of what, whether it is something to be glad of)."""
    run = runs[0]
    found: list[tuple[str, str, str, bool]] = []
    if run.last:
        bits = run.last["bits_per_byte"]
        beaten = sorted((level, name) for name, level in run.of("baselines").items() if bits < level)
        best = f"below {_BASELINE_NAMES.get(beaten[0][1], beaten[0][1])} ({beaten[0][0]:.3f})" if beaten else ""
        found.append(("bits per byte", f"{bits:.3f}", best, bool(beaten)))
        found.append(("validation loss", f"{run.last['loss']:.3f}", "nats per token", False))
        found.append(("perplexity", f"{run.last['perplexity']:,.1f}", f"over {run.last['tokens']:,} tokens", False))
    if run.tokens_per_second:
        device = run.record.get("device", "")
        found.append(("tokens per second", f"{run.tokens_per_second:,.0f}", f"median, {device}", False))
    found.append(("time", _short(run.seconds), f"{len(run.steps):,} steps", False))
    if accounting := run.of("accounting"):
        cost = f"{accounting['flops_per_token'] / 1e6:.1f} MFLOP a token"
        found.append(("parameters", f"{accounting['parameters'] / 1e6:.2f} M", cost, False))
    cards = "".join(
        f'<div class="card tile{" good" if good else ""}"><div class="label">{escape(label)}</div>'
        f'<div class="number">{escape(number)}</div><div class="more">{escape(more)}</div></div>'
        for label, number, more, good in found
    )
    return f'<div class="tiles">{cards}</div>'


def comparison(runs: Sequence[Run]) -> str:
    head = ("run", "steps", "tokens", "validation loss", "perplexity", "bits per byte", "tokens/s", "time")
    rows = []
    for run in runs:
        last = run.last or {}
        cells = [
            f"{len(run.steps):,}",
            f"{run.tokens_trained / 1e6:.2f} M",
            *(
                ("diverged", "–", "–")
                if run.diverged
                else (f"{last[key]:.4f}" if key in last else "–" for key in ("loss", "perplexity", "bits_per_byte"))
            ),
            f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "–",
            duration(run.seconds),
        ]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f'<tr><td><span class="swatch c{run.color}"></span>{escape(run.name)}</td>{numbers}</tr>')
    heads = "".join(f"<th{'' if index == 0 else ' class=number'}>{name}</th>" for index, name in enumerate(head))
    return f'<div class="card scroll"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


def learning(runs: Sequence[Run]) -> str:
    charts = []
    ceiling = _ceiling(runs)
    for x_key, x_label in (("step", "steps"), ("seconds", "seconds of wall-clock")):
        series = []
        for run in runs:
            points = [(row[x_key], row["loss"]) for row in run.steps]
            evaluations = [(row[x_key], row["loss"]) for row in run.evaluations]
            if len(runs) == 1:
                series += [Series("each step", points, 1, "faint"), Series("training", smoothed(points), 1)]
                series.append(Series("validation", evaluations, 2, "dots"))
            else:
                series += [Series(run.name, [(x, min(y, ceiling)) for x, y in smoothed(points)], run.color, run.line)]
        charts.append(f'<div class="card">{line_chart(series, x_label, "Loss, nats per token")}</div>')
    alarm = "".join(
        f"<p>{escape(run.name)} diverged at step {row['step']}: the loss was {escape(row['loss'])}.</p>"
        for run in runs
        if (row := run.diverged)
    )
    return f'<h2>Learning</h2>{alarm}<div class="grid2">{"".join(charts)}</div>'


def _ceiling(runs: Sequence[Run]) -> float:
    """Where curves of a comparison are cut off, so that one that diverges does not flatten the others."""
    starts = [run.steps[0]["loss"] for run in runs if run.steps]
    return 1.1 * max(starts) if starts and any(run.diverged for run in runs) else math.inf


def bits_per_byte(runs: Sequence[Run]) -> str:
    baselines = runs[0].of("baselines")
    bars = [(_BASELINE_NAMES.get(name, name), bits, 0) for name, bits in baselines.items()]
    bars += [(run.name, run.last["bits_per_byte"], run.color) for run in runs if run.last and not run.diverged]
    if not bars:
        return ""
    return (
        "<h2>Bits per byte</h2><p>The same validation text for all, in bits per byte of it; less is better. Token "
        "frequencies are counted on the training text; the compressors see the validation text alone, all of it.</p>"
        f'<div class="card">{bar_chart(bars, "bits per byte")}</div>'
    )


_BASELINE_NAMES = {"unigram": "token frequencies", "bigram": "token pairs", "zlib": "zlib -9", "lzma": "lzma -9e"}


def samples(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        for row in of_kind(list(run.rows), "sample"):
            prompt, text = row["prompt"], row["text"]
            body = f"<mark>{escape(prompt)}</mark>{escape(text.removeprefix(prompt))}"
            label = f"<h3>{escape(run.name)}, step {row['step']}</h3>" if len(runs) > 1 else ""
            blocks.append(f"<div>{label}<pre>{body}</pre></div>")
    if not blocks:
        return ""
    settings = runs[0].configuration["evaluation"]
    how = f"Temperature {settings['temperature']}, top-p {settings['top_p']}; the prompt is coloured."
    return f'<h2>What it writes</h2><p>{how}</p><div class="samples">{"".join(blocks)}</div>'


def tokenizer(runs: Sequence[Run]) -> str:
    cards = []
    for run in _distinct(runs, lambda run: run.of("tokenizer").get("fingerprint")):
        facts = run.of("tokenizer")
        if "bytes_per_token" not in facts:
            continue
        rows = {
            "tokens in the vocabulary": f"{facts['tokens']:,}",
            "merges": f"{facts['merges']:,}",
            "pattern, tie break": f"{facts['pattern']}, {facts['tie_break'] or 'unknown'}",
            "training text": f"{facts['train_bytes'] / 1e6:,.1f} MB, {facts['train_tokens']:,} tokens",
            "bytes per token, training text": f"{facts['bytes_per_token']['train']:.3f}",
            "bytes per token, validation text": f"{facts['bytes_per_token']['validation']:.3f}",
            "time to train": duration(facts["seconds"]) if facts.get("seconds") is not None else "made elsewhere",
            "fingerprint": facts["fingerprint"],
        }
        cards.append(f'<div class="card">{_table(rows)}</div>')
        kinds = {"Longest tokens": "longest_tokens", "Longest tokens with letters": "longest_words"}
        chips = "".join(
            f'<h3>{title}</h3><div class="chips">{_chips(facts[key])}</div>' for title, key in kinds.items()
        )
        cards.append(f'<div class="card">{chips}</div>')
    return f'<h2>Tokenizer</h2><div class="grid2">{"".join(cards)}</div>' if cards else ""


def throughput(runs: Sequence[Run]) -> str:
    series = [
        Series(run.name, smoothed([(row["step"], row["tokens_per_second"]) for row in run.steps]), run.color, run.line)
        for run in runs
    ]
    cards = [f'<div class="card">{line_chart(series, "steps", "Tokens per second")}</div>']
    for run in runs:
        end = next(iter(of_kind(list(run.rows), "end")), {})
        rate, cost = run.tokens_per_second, run.of("accounting").get("flops_per_token")
        mfu = run.steps[-1].get("mfu") if run.steps else None
        rows = {
            "device": run.record.get("device", ""),
            "tokens per second, median": f"{rate:,.0f}" if rate else "–",
            "arithmetic, median": f"{rate * cost / 1e9:,.1f} GFLOP/s" if rate and cost else "–",
            "share of the device's peak (MFU)": f"{mfu:.1%}" if mfu else "no peak is known for this device",
            "peak memory of the process": f"{end['peak_memory'] / 1e6:,.0f} MB" if end else "–",
        }
        name = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        cards.append(f'<div class="card">{name}{_table(rows)}</div>')
    return f'<h2>Throughput</h2><div class="grid2">{"".join(cards)}</div>'


def decisions(runs: Sequence[Run]) -> str:
    blocks = []
    for run in _distinct(runs, lambda run: json.dumps(run.of("decisions"), sort_keys=True)):
        rows = "".join(_decision_rows(one, 0) for one in run.of("decisions").values())
        name = f"<h3>{escape(run.name)}</h3>" if len(runs) > 1 else ""
        blocks.append(
            f'<div class="card scroll">{name}<table><tr><th>component</th><th>backend</th><th>why</th>'
            f"<th>code</th></tr>{rows}</table></div>"
        )
    return (
        "<h2>Which backend served what</h2><p>Every component was chosen once, before the first step. The code's "
        f"fingerprint is in the checkpoints, and a run is continued by the same code only.</p>{''.join(blocks)}"
    )


def _decision_rows(decision: Mapping[str, Any], depth: int) -> str:
    verb = "demanded" if decision["demanded"] else "preferred"
    layer = {"argument": "the run's configuration"}.get(decision["layer"], decision["layer"])
    why = "the default: nothing else was asked for" if layer == "default" else f"{verb} by {layer}"
    why = f"in place of {decision['preferred']}, {why}" if decision["preferred"] else why
    refused = "".join(f"; not {one['backend']}: {one['reason']}" for one in decision["rejected"])
    row = (
        f"<tr{' class=part' if depth else ''}><td>{escape(decision['component'])}</td>"
        f'<td><span class="badge">{escape(decision["backend"])}</span></td>'
        f'<td class="why">{escape(why + refused)}</td><td><code>{escape(decision["fingerprint"])}</code></td></tr>'
    )
    return row + "".join(_decision_rows(part, depth + 1) for part in decision["parts"])


def configuration(runs: Sequence[Run]) -> str:
    sections = []
    for section, content in runs[0].configuration.items():
        if not isinstance(content, Mapping):
            continue
        rows = []
        for key in content:
            values = [run.configuration.get(section, {}).get(key) for run in runs]
            same = all(value == values[0] for value in values)
            cells = "".join(f"<td>{escape(_value(value))}</td>" for value in (values[:1] if same else values))
            rows.append(f"<tr{'' if same else ' class=differs'}><th>{escape(key)}</th>{cells}</tr>")
        sections.append(f"<section><h3>{escape(section)}</h3><table>{''.join(rows)}</table></section>")
    note = " Where runs differ, every value is shown, in bold." if len(runs) > 1 else ""
    return (
        f'<h2>Configuration</h2><details class="card" open><summary>Every hyper-parameter.{note}</summary>'
        f'<div class="columns">{"".join(sections)}</div></details>'
    )


def _distinct(runs: Sequence[Run], identity: Callable[[Run], Any]) -> list[Run]:
    """The first run of each kind: what runs share is shown once."""
    found: dict[Any, Run] = {}
    for run in runs:
        found.setdefault(identity(run), run)
    return list(found.values())


def _table(rows: Mapping[str, str]) -> str:
    lines = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in rows.items())
    return f"<table>{lines}</table>"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)


def _chips(tokens: Sequence[str]) -> str:
    return "".join(f"<code>{escape(_visible(token))}</code>" for token in tokens)


def _visible(token: str) -> str:
    """Spaces and line ends as signs; a sign that repeats is counted."""
    shown = token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    runs = ((sign, len(list(group))) for sign, group in groupby(shown))
    return "".join(f"{sign}×{count} " if count > 4 else sign * count for sign, count in runs).strip()


def _short(seconds: float) -> str:
    """One number: seconds, minutes or hours."""
    scale, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= s or s == 1)
    return f"{seconds / scale:.1f} {unit}"
