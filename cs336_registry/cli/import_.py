"""`cs336 import`: a model from the rest of the field."""

from __future__ import annotations

from pathlib import Path


def import_(source: Path, /, *, out: Path, quiet: bool = False) -> int:
    """Make a run of a Hugging Face Llama folder, proven by comparing logits.

    The folder holds config.json, *.safetensors and tokenizer.json (byte-level byte pairs); pickles are not read.
    Afterwards `cs336 generate OUT` writes with the model, and `cs336 export OUT` gives the same weights back.

    Example: `cs336 import my-llama --out runs/my-llama`.

    Parameters
    ----------
    source
        A folder that transformers' save_pretrained wrote.
    out
        The run's folder.
    quiet
        Print nothing.
    """
    from ..pipeline.import_ import import_ as make
    from ..pipeline.progress import Progress

    make(source, out, progress=Progress(quiet=quiet))
    return 0
