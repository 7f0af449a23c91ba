"""`cs336 quickstart`: the main job, end to end."""

from __future__ import annotations

from pathlib import Path


def quickstart(
    *,
    corpus: Path | None = None,
    out: Path = Path("runs/quickstart"),
    backend: str | None = None,
    text_backend: str = "auto",
    steps: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> int:
    """From real text to a trained model and an HTML report, in under three minutes.

    Trains a tokenizer on the sources of Python's own standard library, encodes them, trains a small Transformer
    language model, evaluates it and lets it write. Nothing is fetched. Interrupted, the same command continues.

    Parameters
    ----------
    corpus
        Your own text instead: a file (plain, .gz, .zst, .jsonl, .parquet), a folder or a glob.
    out
        The run's folder; report.html will be in it.
    backend
        A selector for the model's components, such as "torch" or "torch,adamw=reference".
    text_backend
        A selector for the tokenizer's components; "auto" is the fastest one that runs here.
    steps
        Optimizer steps; by default as many as take about a minute and a half on two cores.
    seed
        Decides first weights, batches and samples: the same seed gives the same model.
    quiet
        Print nothing.
    """
    from ..pipeline.progress import Progress
    from ..pipeline.quickstart import configure
    from ..pipeline.quickstart import quickstart as run

    configuration = configure(corpus=corpus, backend=backend, text_backend=text_backend, steps=steps, seed=seed)
    run(configuration, out, Progress(quiet=quiet))
    return 0
