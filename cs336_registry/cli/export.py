"""`cs336 export`: a trained model for the rest of the field."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def export(
    run: Path,
    /,
    *,
    format: Literal["hf"] = "hf",
    out: Path | None = None,
    checkpoint: str = "last",
    quiet: bool = False,
) -> int:
    """Write a trained model as a Hugging Face Llama folder, proven by comparing logits.

    Afterwards `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)` and `AutoTokenizer` load it. Nothing appears
    under the final name unless transformers computes the same logits and token ids as this model.

    Example: `cs336 export runs/quickstart --out my-model`.

    Parameters
    ----------
    run
        The folder of a run.
    format
        hf: safetensors, config.json, tokenizer.json.
    out
        The folder to write; by default RUN/hf.
    checkpoint
        last, best, or the number of a step.
    quiet
        Print nothing.
    """
    from ..pipeline.export import export as write
    from ..pipeline.progress import Progress
    from .text_backends import disk_full

    with disk_full(out or run / format):
        write(run, out, format=format, checkpoint=checkpoint, progress=Progress(quiet=quiet))
    return 0
