"""Training the runs of a sweep one after the other, each once: finished ones are known, killed ones continue.

A run that diverges is a result. Its loss may become no number, or leave the range of what can still come to something
(see divergence.py); it is marked in its metrics, keeps its checkpoints and costs the other runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..text.files import write_json, write_text
from . import report
from .configuration import Configuration, differences, load
from .divergence import DivergenceWatch
from .errors import DivergedError, MismatchError
from .metrics import MetricsLog, of_kind
from .progress import Progress
from .report_run import Run, read
from .run_folder import RunFolder
from .variations import Variation, variations

OF_THE_DATA = ("data.", "tokenizer.", "model.vocab_size")
"""Keys that decide tokenizer and tokens; runs that differ in none of them share both."""


@dataclass(frozen=True)
class Result:
    """A run of a sweep. diverged: where and how, None for one that was trained to its end."""

    variation: Variation
    run: Run
    diverged: str | None

    @property
    def loss(self) -> float | None:
        """The last validation loss, in nats per token."""
        return None if self.diverged or self.run.last is None else self.run.last["loss"]


def sweep(
    source: str,
    vary: Sequence[str],
    out: Path,
    *,
    settings: Sequence[str] = (),
    same_tokens: bool = False,
    progress: Progress | None = None,
) -> list[Result]:
    """Train every combination of `vary` in a folder of its own in `out`; write `out`/report.html and sweep.json.

    The best run comes first, those that diverged last.
    """
    progress = progress or Progress()
    chosen = variations(source, vary, settings, same_tokens=same_tokens)
    results: list[Result] = []
    for number, one in enumerate(chosen, start=1):
        added = f" (and, to be comparable, {', '.join(one.added)})" if one.added else ""
        progress.say(f"run {number} of {len(chosen)}: {one.name}{added}")
        configuration = load(source, [*settings, *one.settings, f"name={one.name}"])
        folder = _data_folder(configuration, one, out)
        configuration = load(source, [*settings, *one.settings, f"name={one.name}", f"data.folder={folder}"])
        diverged = trained(configuration, out / one.name, progress)
        results.append(Result(one, read(out / one.name, number - 1), diverged))
    results.sort(key=lambda result: (result.loss is None, result.loss or 0.0))
    write_json(out / "sweep.json", {"source": source, "runs": [_plain(result) for result in results]}, indent=2)
    write_text(out / "report.html", report.page([read(out / one.name, number) for number, one in enumerate(chosen)]))
    return results


def trained(configuration: Configuration, out: Path, progress: Progress) -> str | None:
    """Train `configuration` in `out` unless that is done. Returns how it diverged, or None.

    Raises MismatchError where `out` holds a run of another configuration.
    """
    folder = RunFolder(out)
    done, diverged = _known(configuration, folder)
    if done:
        progress.say(f"{out.name}: {diverged or 'trained before'}")
        return diverged
    from . import training

    try:
        training.train(configuration, out, progress=progress, watchers=[DivergenceWatch(folder.metrics())])
    except DivergedError as error:
        if _divergence(folder) is None:
            _mark(folder, str(error))
        progress.say(f"{out.name}: {error}")
    return _divergence(folder)


def _known(configuration: Configuration, folder: RunFolder) -> tuple[bool, str | None]:
    """Whether nothing is left to do in `folder`, and how its run diverged, if it did."""
    if not folder.metrics_path.is_file() or not folder.record_path.is_file():
        return False, None
    changed = differences(folder.record()["configuration"], configuration.to_dict())
    if changed:
        told = "; ".join(f"{key} was {before!r}, is now {now!r}" for key, before, now in changed)
        raise MismatchError(
            f"{folder.path} is a run of another configuration ({told}): set it back, or choose another --out"
        )
    diverged = _divergence(folder)
    ends = [row["step"] for row in of_kind(folder.metrics(), "end")]
    return diverged is not None or configuration.training.steps in ends, diverged


def _divergence(folder: RunFolder) -> str | None:
    rows = of_kind(folder.metrics(), "divergence")
    if not rows:
        return None
    found = f"loss {rows[-1]['loss']}, gradient norm {rows[-1].get('gradient_norm')}"
    return rows[-1].get("told") or f"diverged at step {rows[-1]['step']}: {found}"


def _mark(folder: RunFolder, told: str) -> None:
    last = of_kind(folder.metrics(), "step")[-1]
    log = MetricsLog(folder.metrics_path)
    log.append("divergence", last["step"], lr=last["lr"], loss=f"{last['loss']:.3f}", told=told)
    log.flush(sync=True)
    log.close()


def _data_folder(configuration: Configuration, one: Variation, out: Path) -> Path:
    """Where this run's tokenizer and tokens are: with those of all runs that have the same."""
    shared = Path(configuration.data.folder) if configuration.data.folder else out / "data"
    own = [f"{key}={value}" for key, value in one.values if key.startswith(OF_THE_DATA)]
    return shared / "_".join(own).replace("/", "-") if own else shared


def _plain(result: Result) -> dict[str, object]:
    last = result.run.last or {}
    return {
        "name": result.variation.name,
        "values": dict(result.variation.values),
        "added": list(result.variation.added),
        "parameters": result.run.of("accounting").get("parameters"),
        "steps": len(result.run.steps),
        "seconds": round(result.run.seconds, 3),
        "tokens_per_second": result.run.tokens_per_second,
        "loss": last.get("loss"),
        "bits_per_byte": last.get("bits_per_byte"),
        "diverged": result.diverged,
    }
