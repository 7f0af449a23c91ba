"""Whether `transformers` computes from a folder what the model here computes: asked before a result gets its name."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compare import root_mean_square, rounding_error
from ..text.formats import needs

FACTOR, ROUNDINGS = 4.0, 16.0
"""Two orders of summing the same products differ by a small multiple of either one's error against float64."""


@dataclass(frozen=True)
class Agreement:
    """Root-mean-square distances of float32 logits from the float64 model's, over `tokens` positions."""

    error: float
    allowed: float
    own_error: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens:,} positions agree: transformers is {self.error:.2e} from float64, this model "
            f"{self.own_error:.2e}, allowed {self.allowed:.2e}"
        )


def compare(folder: Path, model: Any, texts: Sequence[Sequence[int]], context_length: int) -> Agreement:
    """Load `folder` with transformers and hold its logits against `model`'s, on random ids and on the ids of `texts`.

    The error of transformers against the float64 model may be FACTOR times that of the float32 model here, plus
    ROUNDINGS roundings, plus one rounding per position: transformers multiplies position and frequency in float32, so
    an angle is off by up to position · 2^-24, where the tables here are computed in float64. A row that is permuted
    wrongly is off by orders of magnitude more. Raises ValueError where the logits differ.
    """
    vocab_size = len(model.get_submodule("lm_head").weight)
    generator = torch.Generator().manual_seed(336)
    rows = [torch.randint(vocab_size, (context_length,), generator=generator)]
    rows += [torch.tensor(ids[:context_length]) for ids in texts if ids]
    exact = copy.deepcopy(model).double()
    theirs = load(folder)
    differences: dict[str, list[Tensor]] = {"theirs": [], "ours": []}
    scale = []
    with torch.no_grad():
        for row in rows:
            truth = exact(row[None])[0]
            differences["theirs"].append(_logits(theirs, row).double() - truth)
            differences["ours"].append(model(row[None])[0].double() - truth)
            scale.append(truth)
    error, own_error, size = (root_mean_square(torch.cat(x)) for x in (*differences.values(), scale))
    allowed = FACTOR * own_error + (ROUNDINGS + context_length) * rounding_error(torch.float32) * size
    agreement = Agreement(error, allowed, own_error, sum(map(len, rows)))
    if not error <= allowed:
        raise ValueError(
            f"transformers computes other logits from {folder}: they are {error:.3g} from the float64 model's, at most "
            f"{allowed:.3g} is rounding (this model's own float32 logits: {own_error:.3g}). Nothing was written; "
            f"please report this with the model's configuration"
        )
    return agreement


def load(folder: Path) -> torch.nn.Module:
    """The folder as transformers reads it, in float32 on the CPU; no code and no pickle in the folder is run."""
    transformers = needs("transformers", "comparing logits with Hugging Face's Llama")
    with quiet(transformers):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    return model.float().eval()


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no advice from the library."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _logits(model: Any, row: Tensor) -> Tensor:
    return model(input_ids=row[None], use_cache=False).logits[0]
