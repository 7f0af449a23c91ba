"""The course's deliverables: each with the command that makes it, and those that fit this machine run, on one page.

The small form takes minutes on two CPU cores: tiny models on part of the configuration's text, to see every curve's
shape. `full` takes the configuration as it is. The page is written anew after every run; started again, the same
command continues where it was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..text import samples
from ..text.files import write_text
from . import handout_page
from .completion import Completion, complete
from .configuration import Configuration, load
from .decoding import Sampling, Speed
from .progress import Progress
from .report_run import Run, read
from .run_folder import RunFolder
from .sweep import trained
from .trained import load as load_trained
from .trained import read_tokenizer
from .variations import at_equal_tokens, feed_forward_width

PILE_BYTES = 825e9
"""The Pile, to which the course has the speed of encoding extrapolated."""

SMALL = (
    "data.maximum_bytes=1500000",
    "model.vocab_size=1024",
    "model.context_length=64",
    "model.d_model=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.d_ff=160",
    "training.steps=120",
    "training.batch_size=8",
    "schedule.warmup_steps=10",
    "evaluation.every=40",
    "evaluation.sequences=64",
    "evaluation.final_sequences=256",
    "evaluation.sample_tokens=64",
    "checkpoint.every=120",
    "checkpoint.keep_last=1",
    "checkpoint.keep_best=false",
)
DIVERGENT = 1000.0
"""Times the configured learning rate; a model that is normalised in every block survives less."""


@dataclass(frozen=True)
class Experiment:
    """Runs that are compared: the name of each and what it changes."""

    key: str
    title: str
    asks: str
    runs: Mapping[str, Sequence[str]]


@dataclass
class Handout:
    """What has been made so far."""

    source: str
    configuration: Configuration
    out: Path
    full: bool
    settings: tuple[str, ...]
    experiments: tuple[Experiment, ...]
    runs: dict[str, Run] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    encoding: tuple[dict[str, Any], ...] = ()
    completion: Completion | None = None
    speed: str = ""

    def command(self, name: str) -> str:
        """What makes one run, as it is typed."""
        changes = next((one.runs[name] for one in self.experiments if name in one.runs), ())
        words = [f"--set '{setting}'" for setting in (*self.settings, *changes)]
        return f"cs336 train {self.source} {' '.join(words)} --out {self.out / name}"


def experiments(configuration: Configuration, full: bool) -> tuple[Experiment, ...]:
    """The sweeps and ablations, around a configuration."""
    lr, batch, model = configuration.optimizer.lr, configuration.training.batch_size, configuration.model
    rates = [lr * factor for factor in ((0.03, 0.1, 0.3, 3, 10) if full else (0.1, 5))]
    batches = sorted({1, max(1, batch // 4), batch * 4} if full else {max(1, batch // 8), batch * 2})
    return (
        Experiment("baseline", "Base model", "a training script with every hyper-parameter", {"base": ()}),
        Experiment(
            "learning_rate",
            "Learning-rate sweep",
            "curves over learning rates",
            {f"lr_{rate:.3g}": (f"optimizer.lr={rate:.6g}",) for rate in rates},
        ),
        Experiment(
            "divergence",
            "A divergent learning rate",
            "what too large a step does; on axes of its own",
            {"lr_divergent": (f"optimizer.lr={lr * DIVERGENT:.6g}", "optimizer.max_gradient_norm=none")},
        ),
        Experiment(
            "batch_size",
            "Batch-size sweep",
            "curves over batch sizes, the same number of tokens each",
            {f"batch_{size}": at_equal_tokens(configuration, size) for size in batches},
        ),
        Experiment(
            "ablations",
            "Ablations",
            "no RMSNorm, post-norm, no positions, SiLU instead of SwiGLU",
            {
                "no_norm": ("model.norm=none",),
                "post_norm": ("model.norm=post",),
                "no_positions": ("model.position=none",),
                "silu": ("model.ffn=silu", f"model.d_ff={feed_forward_width(model.d_ff, model.ffn, 'silu')}"),
            },
        ),
    )


def make(source: str, out: Path, *, full: bool = False, progress: Progress) -> Handout:
    """Run what fits, in `out`, and write `out`/handout.html."""
    settings: list[str] = [] if full else [*SMALL]
    base = load(source, settings)
    if base.data.folder is None:
        settings.append(f"data.folder={out / 'data'}")
        base = load(source, settings)
    handout = Handout(source, base, out, full, tuple(settings), experiments(base, full))
    for experiment in handout.experiments:
        for name, changes in experiment.runs.items():
            _train(handout, name, changes, progress)
            if name == "base":
                progress.say("encoding own and foreign text ...")
                handout.encoding = _measure_encoding(handout)
                progress.say("generating ...")
                handout.completion, handout.speed = _generate(handout)
            write_text(out / "handout.html", handout_page.page(handout))
    progress.say(f"the handout is {out / 'handout.html'}")
    return handout


def _train(handout: Handout, name: str, changes: Sequence[str], progress: Progress) -> None:
    """One run, unless it is there; a divergence is a result, not an error."""
    configuration = load(handout.source, [*handout.settings, *changes, f"name={name}"])
    start = time.monotonic()
    diverged = trained(configuration, handout.out / name, Progress(quiet=True))
    progress.say(f"{name}: {diverged or f'trained in {time.monotonic() - start:.0f} s'}")
    if diverged is not None:
        handout.failed[name] = diverged
    handout.runs[name] = read(handout.out / name, len(handout.runs))


def _measure_encoding(handout: Handout) -> tuple[dict[str, Any], ...]:
    """Bytes per token and bytes per second on text of the corpus and on made-up prose."""
    folder = RunFolder(handout.out / "base")
    tokenizer = read_tokenizer(handout.configuration, folder, handout.configuration.text_backend)
    # The text of the corpus is kept beside the tokens, or is a file of the user's own.
    own = Path(folder.record()["corpus"]["train"]["path"])
    texts = {"made-up prose, foreign to the corpus": samples.prose(60_000, documents=20, seed=5)}
    if own.is_file() and own.suffix != ".npy":
        with open(own, encoding="utf-8", errors="replace", newline="") as file:
            texts = {"text of the corpus": file.read(2_000_000)} | texts
    rows = []
    for name, text in texts.items():
        tokenizer.tokenizer.encode(text[:1000])
        start = time.perf_counter()
        tokens = len(tokenizer.tokenizer.encode(text))
        rate = len(text.encode()) / (time.perf_counter() - start)
        rows.append(
            {
                "text": name,
                "bytes": len(text.encode()),
                "bytes_per_token": len(text.encode()) / tokens,
                "bytes_per_second": rate,
                "pile_hours": PILE_BYTES / rate / 3600,
            }
        )
    return tuple(rows)


def _generate(handout: Handout) -> tuple[Completion, str]:
    """At least 256 tokens, or up to the end-of-text token, as the course wants."""
    trained = load_trained(handout.out / "base")
    speed = Speed()
    prompts = handout.configuration.evaluation.prompts
    prompt = next((prompt for prompt in prompts if prompt), "")
    (completion,) = next(complete(trained, [prompt], Sampling(256, 0.8, None, 0.95, 0), speed=speed))
    return completion, str(speed)
