"""The whole job on any machine in minutes: text → tokenizer → tokens → model → evaluation → samples → report.

It is `train` with the shipped configuration "quickstart"; nothing here is done otherwise than in a larger run.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..text.progress import duration
from .configuration import Configuration, load
from .progress import Progress
from .run_folder import RunFolder

TEXT = ("bpe_trainer", "tokenizer")


def configure(
    *,
    corpus: Path | None = None,
    backend: str | None = None,
    text_backend: str = "auto",
    steps: int | None = None,
    seed: int = 0,
) -> Configuration:
    """The shipped configuration with the newcomer's few choices."""
    settings = [f"training.seed={seed}", f"text_backend={text_backend}"]
    settings += [f"backend={backend}"] if backend is not None else []
    if corpus is not None:
        # Prompts of Python code would be strange at the head of anything else: start new documents instead.
        settings += [f"data.train={_quoted(str(corpus))}", 'evaluation.prompts=["", "", ""]']
    if steps is not None:
        settings += [f"training.steps={steps}", f"schedule.warmup_steps={min(25, steps // 4)}"]
    return load("quickstart", settings)


def quickstart(configuration: Configuration, out: Path, progress: Progress) -> Path:
    """Run the job in `out`, continuing what is there, print what came out, and return the report's path."""
    start = time.monotonic()
    _announce(configuration, progress)
    progress.say("loading PyTorch ...")
    from . import report, training

    summary = training.train(configuration, out, progress=progress)
    page = report.write([out], RunFolder(out).report)
    baselines = RunFolder(out).record()["baselines"]
    bits = summary.evaluation.bits_per_byte
    progress.say("")
    for name, level in sorted({**baselines, "this model": bits}.items(), key=lambda item: -item[1]):
        progress.say(f"  {level:6.3f} bits per byte   {name}")
    learnt = bits < baselines["zlib"]
    progress.say(f"  {'below' if learnt else 'NOT below'} zlib -9, the level that this job is meant to reach")
    for text in summary.samples[:1]:
        progress.say("\nIt writes:\n" + "\n".join(f"  | {line}" for line in text.splitlines()[:24]))
    progress.say(f"\nDone in {duration(time.monotonic() - start)}. Open {page}")
    return page


def _announce(configuration: Configuration, progress: Progress) -> None:
    """Which backend will serve what, before anything is imported for it."""
    import cs336_registry as registry

    text = {name: registry.resolve(name, backend=configuration.text_backend).backend for name in TEXT}
    progress.say("backends: " + ", ".join(f"{name} by {backend}" for name, backend in text.items()))
    decision = registry.resolve("transformer_lm", backend=configuration.backend)
    parts = sorted({part.backend for part in decision.parts} or {decision.backend})
    progress.say(f"          the model by {', '.join(parts)} (chosen by {decision.layer})")


def _quoted(text: str) -> str:
    """`text` as a TOML string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
