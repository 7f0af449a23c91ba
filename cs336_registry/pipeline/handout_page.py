"""The handout's page: the list of deliverables, then what was measured for each. It looks as the reports do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from ..text.progress import duration
from . import model_costs, report_sections
from .configuration import load

if TYPE_CHECKING:
    from .handout import Handout

ELSEWHERE = (
    (
        "TinyStories tokenizer, vocab 10 000",
        "time, memory, longest token; at most 30 minutes and 30 GB",
        "cs336 tokenizer train data/cache/tinystories/TinyStoriesV2-GPT4-train.txt --vocab-size 10000 "
        "--special-token '<|endoftext|>' --out tokenizers/tinystories",
        "needs the TinyStories text: cs336 data download tinystories",
    ),
    (
        "OpenWebText tokenizer, vocab 32 000",
        "time, memory, longest token; at most 12 hours and 100 GB",
        "cs336 tokenizer train data/cache/owt/owt_train.txt.gz --vocab-size 32000 "
        "--special-token '<|endoftext|>' --out tokenizers/owt",
        "needs the OpenWebText sample: cs336 data download owt",
    ),
    (
        "TinyStories model, 17 M parameters",
        "327.68 M tokens, validation loss at most 1.45",
        "cs336 train tinystories_17m",
        "needs the TinyStories text and a GPU",
    ),
    (
        "OpenWebText model",
        "a larger model on web text",
        "cs336 train gpt2_124m",
        "needs the OpenWebText sample and a GPU",
    ),
    (
        "FlashAttention-2 in PyTorch and Triton",
        "equal to the textbook, and timed beside it",
        "cs336 bench attention",
        "assignment 2; Triton needs a GPU to be timed",
    ),
    (
        "DDP, FSDP, sharded optimizer",
        "equal to one process",
        "cs336 conformance reference --components ddp --components fsdp --components sharded_optimizer",
        "assignment 2; runs here, takes minutes",
    ),
)
"""(deliverable, what the course asks, the command, why it is not run for the page)."""
SHIPPED = ("tinystories_17m", "gpt2_124m")


def page(handout: Handout) -> str:
    style, script = (
        files("cs336_registry.pipeline").joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    form = "as configured" if handout.full else "small models, for the shapes of the curves"
    sections = [
        deliverables(handout),
        accounting(handout),
        tokenizer(handout),
        *(experiment(handout, one.key) for one in handout.experiments),
        generation(handout),
        log(handout),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">',
            f"<title>Handout · {escape(handout.source)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>",
            f"<header><h1>The course's deliverables</h1><p>From {escape(handout.source)}, {form}.</p></header>",
            *filter(None, sections),
            f"</main>\n<script>\n{script}</script>\n</body>\n</html>\n",
        ]
    )


def deliverables(handout: Handout) -> str:
    rows = [("Parameters, operations, memory", "accounting of a configuration", "cs336 handout", "below")]
    inspect = f"cs336 tokenizer inspect {handout.out / 'data' / 'tokenizer'}"
    rows.append(
        ("Tokenizer experiments", "bytes per token, own and foreign; bytes/s; 825 GB", inspect, _done(handout.encoding))
    )
    for one in handout.experiments:
        made = sum(name in handout.runs for name in one.runs)
        rows.append((one.title, one.asks, "cs336 handout", f"{made} of {len(one.runs)} runs"))
    write = f"cs336 generate {handout.out / 'base'} --max-new-tokens 256"
    rows.append(("Generation", "256 tokens or up to end-of-text", write, _done(handout.completion)))
    rows.append(("Experiment log", "loss against steps and wall-clock", "cs336 report RUNS", _done(handout.runs)))
    rows += [(title, asks, command, f"not run: {why}") for title, asks, command, why in ELSEWHERE]
    cells = "".join(
        f"<tr><td>{escape(title)}</td><td>{escape(asks)}</td><td><code>{escape(command)}</code></td>"
        f'<td class="why">{escape(state)}</td></tr>'
        for title, asks, command, state in rows
    )
    head = "<tr><th>deliverable</th><th>what is asked</th><th>command</th><th>state</th></tr>"
    return f'<h2>Deliverables</h2><div class="card scroll"><table>{head}{cells}</table></div>'


def accounting(handout: Handout) -> str:
    configurations = {handout.source if handout.full else f"{handout.source}, small": handout.configuration}
    configurations |= {name: load(name) for name in SHIPPED if name not in configurations}
    named = list(configurations.items())
    parts: dict[str, list[str]] = {}
    for _, one in named:
        counts = model_costs.parameters(one.model)
        for part, count in {**counts, "all": sum(counts.values())}.items():
            parts.setdefault(part, []).append(f"{count:,}")
    flops: dict[str, list[str]] = {}
    for _, one in named:
        costs = model_costs.forward_flops(one.model)
        for part, cost in costs.items():
            flops.setdefault(part, []).append(f"{cost / 1e9:,.2f} ({cost / sum(costs.values()):.0%})")
        flops.setdefault("all", []).append(f"{sum(costs.values()) / 1e9:,.2f}")
    memory: dict[str, list[str]] = {}
    for _, one in named:
        need = model_costs.training_memory(one)
        for part in ("weights", "gradients", "optimizer", "activations", "total"):
            memory.setdefault(part, []).append(f"{getattr(need, part) / 2**30:,.3f}")
    names = [name for name, _ in named]
    cards = [
        ("Parameters", parts),
        ("Forward pass of one sequence, GFLOP", flops),
        ("Training step with AdamW and textbook attention, GiB", memory),
    ]
    body = "".join(f'<div class="card scroll"><h3>{title}</h3>{_grid(names, rows)}</div>' for title, rows in cards)
    return f'<h2>Accounting</h2><div class="grid2">{body}</div>'


def tokenizer(handout: Handout) -> str:
    if "base" not in handout.runs:
        return ""
    rows = {
        row["text"]: [
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['bytes_per_token']:.3f}",
            f"{row['bytes_per_second'] / 1e6:.2f} MB/s",
            f"{row['pile_hours']:,.0f} h",
        ]
        for row in handout.encoding
    }
    table = _grid(("size", "bytes per token", "speed, one process", "825 GB would take"), rows)
    facts = report_sections.tokenizer([handout.runs["base"]])
    return f'{facts}<h3>Encoding</h3><div class="card scroll">{table}</div>'


def experiment(handout: Handout, key: str) -> str:
    chosen = next(one for one in handout.experiments if one.key == key)
    names = [name for name in ("base", *chosen.runs) if name in handout.runs]
    if not any(name in handout.runs for name in chosen.runs):
        return ""
    runs = [handout.runs[name] for name in dict.fromkeys(names)]
    told = "".join(
        f"<p>{escape(name)} {escape(handout.failed[name])}.</p>" for name in chosen.runs if name in handout.failed
    )
    curves = report_sections.learning(runs).replace("<h2>Learning</h2>", "", 1)
    return f"<h2>{escape(chosen.title)}</h2>{told}{report_sections.comparison(runs)}{curves}"


def generation(handout: Handout) -> str:
    if handout.completion is None:
        return ""
    found = handout.completion
    end = "ended by itself" if found.stopped else "cut off"
    return (
        f"<h2>Generation</h2><p>{found.tokens} tokens, {end}; {escape(handout.speed)}.</p>"
        f"<pre><mark>{escape(found.prompt)}</mark>{escape(found.text)}</pre>"
    )


def log(handout: Handout) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(handout.failed.get(name) or _loss(run.last))}</td>"
        f"<td>{len(run.steps):,}</td><td>{duration(run.seconds)}</td>"
        f"<td><code>{escape(handout.command(name))}</code></td></tr>"
        for name, run in handout.runs.items()
    )
    head = "<tr><th>run</th><th>validation loss</th><th>steps</th><th>time</th><th>command</th></tr>"
    body = f'<div class="card scroll"><table>{head}{rows}</table></div>'
    return f"<h2>Experiment log</h2>{body}" if rows else ""


def _grid(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in names)
    lines = "".join(
        f"<tr><th>{escape(part)}</th>{''.join(f'<td class=number>{escape(cell)}</td>' for cell in cells)}</tr>"
        for part, cells in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>{lines}</table>"


def _done(what: object) -> str:
    return "below" if what else "not yet"


def _loss(last: Mapping[str, float] | None) -> str:
    return f"{last['loss']:.4f}" if last else "not yet"
