"""A trained model as a folder that Hugging Face's `transformers` loads as Llama.

    config.json, generation_config.json, model.safetensors       AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.json, tokenizer_config.json                        AutoTokenizer.from_pretrained(folder)
    cs336.json                                                   which run, which step, how well the logits agree

The folder is written under a temporary name, loaded with transformers, compared, and only then named.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..text import formats, samples, tokenizer_folder
from ..text.files import sync_folder, write_json
from . import llama, logit_gate
from .logit_gate import Agreement
from .progress import Progress
from .trained import TrainedModel, load, weights

FORMATS = ("hf",)


@dataclass(frozen=True)
class Exported:
    """What was written, and how well the reader's logits agree."""

    folder: Path
    step: int
    agreement: Agreement


def export(
    run: Path, out: Path | None = None, *, format: str = "hf", checkpoint: str = "last", progress: Progress
) -> Exported:
    """Write the model of `run` to `out` (default: RUN/hf).

    Raises ValueError where Llama's layout can't express the model, the tokenizer or the logits; FileExistsError where
    `out` is taken. Nothing is left under `out` then.
    """
    if format not in FORMATS:
        raise ValueError(f"there is no format {format!r} for models: choose {', '.join(FORMATS)}")
    out = out or run / format
    check_free(out)
    # The textbook computes in float64 too, which the comparison needs; weights are the same on every backend.
    trained = load(run, checkpoint=checkpoint, backend="reference")
    llama.check_expressible(trained.configuration.model)
    formats.needs("transformers", "exporting a model, which is proven by loading it,")
    with staged(out) as staging:
        progress.say(f"writing step {trained.step} of {run} ...")
        texts = _write(trained, staging)
        progress.say("loading it with transformers and comparing logits ...")
        _check_tokenizer(trained, staging, texts)
        encoded = [trained.tokenizer.tokenizer.encode(text) for text in texts]
        agreement = logit_gate.compare(staging, trained.model, encoded[:2], trained.configuration.model.context_length)
        write_json(staging / "cs336.json", _origin(trained, agreement), indent=2)
    progress.say(f"{agreement}\n{out} is ready for transformers")
    return Exported(out, trained.step, agreement)


def check_free(out: Path) -> None:
    """Refuse a name that something else has."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: choose another --out, or delete it")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder that is `out` when the block ends without an error, and is gone otherwise; errors name files so."""
    staging = staging_folder(out)
    try:
        yield staging
        publish(staging, out)
    except OSError as error:
        if isinstance(error.filename, str):
            named = os.path.realpath(error.filename)
            error.filename = named.replace(os.path.realpath(staging), os.path.realpath(out))
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def staging_folder(out: Path) -> Path:
    """An empty folder beside `out`, so that it can be renamed to it; what a killed process left there is removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.*.tmp"):
        shutil.rmtree(leftover)
    staging = out.parent / f".{out.name}.{os.getpid()}.tmp"
    staging.mkdir()
    return staging


def publish(staging: Path, out: Path) -> None:
    """Give `staging` its final name in one step, after its content has reached the disk."""
    for path in sorted(staging.rglob("*")):
        if path.is_dir():
            sync_folder(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    sync_folder(staging)
    os.replace(staging, out)
    sync_folder(out.parent)


def _write(trained: TrainedModel, folder: Path) -> list[str]:
    """Everything but cs336.json; returns the texts on which the tokenizer was compared with the library's."""
    settings, tokenizer = trained.configuration.model, trained.tokenizer
    end, end_id = tokenizer.end_of_text, tokenizer.end_of_text_id
    write_json(folder / "config.json", llama.configuration(settings, end_id), indent=2)
    write_json(folder / "generation_config.json", _generation(trained), indent=2)
    state = llama.to_llama(weights(trained.model), settings)
    _save(state, folder / "model.safetensors")
    # safetensors makes files that only their owner may read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    stored = tokenizer_folder.read(tokenizer.folder)
    texts = [
        samples.prose(2000, documents=4),
        *formats.telling_texts(stored.special_tokens, tuple(stored.vocab.values())),
    ]
    formats.export("hf", stored, tokenizer.tokenizer.encode, folder / "tokenizer.json", texts)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({"bos_token": end, "eos_token": end} if end else {}),
        "model_max_length": settings.context_length,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config, indent=2)
    return texts


def _save(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; what the system refuses is an OSError, which the library puts in words alone."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        refused = re.search(r"\(os error (\d+)\)", str(error))
        if refused is None:
            raise
        raise OSError(int(refused[1]), os.strerror(int(refused[1])), str(path)) from None


def _generation(trained: TrainedModel) -> dict[str, Any]:
    """generation_config.json: the run's own sampling settings."""
    evaluation, end_id = trained.configuration.evaluation, trained.tokenizer.end_of_text_id
    sampling = {"temperature": evaluation.temperature, "top_p": evaluation.top_p} if evaluation.temperature else {}
    return {
        "bos_token_id": end_id,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "max_length": trained.configuration.model.context_length,
        "do_sample": bool(sampling),
        **sampling,
    }


def _check_tokenizer(trained: TrainedModel, folder: Path, texts: list[str]) -> None:
    """AutoTokenizer must give the same ids, and the same text back."""
    transformers = formats.needs("transformers", "comparing the tokenizer")
    with logit_gate.quiet(transformers):
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    ours = trained.tokenizer.tokenizer

    def encode(text: str) -> list[int]:
        return theirs.encode(text, add_special_tokens=False)

    with logit_gate.quiet(transformers):
        formats.compare(ours.encode, encode, texts, "transformers reads the exported tokenizer otherwise")
    ids = ours.encode(texts[0])
    if theirs.decode(ids) != ours.decode(ids):
        raise ValueError(f"transformers decodes the exported tokenizer's ids otherwise: {theirs.decode(ids[:40])!r}")


def _origin(trained: TrainedModel, agreement: Agreement) -> dict[str, Any]:
    record = trained.folder.record()
    return {
        "run": trained.configuration.name,
        "step": trained.step,
        "tokenizer": trained.tokenizer.fingerprint,
        "configuration": trained.configuration.to_dict(),
        "versions": record.get("versions"),
        "logits": agreement.to_dict(),
    }
