"""The doctor's look at a configuration: its components, its data, and the memory and disk that it needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import cs336_registry as registry

from ..errors import RegistryError
from ..machine import detect
from ..text.inputs import expand
from . import model_costs, resolved
from .configuration import STANDARD_LIBRARY, Configuration
from .corpus import standard_library_files
from .doctor import Finding
from .doctor_machine import GIB, available_memory, existing
from .errors import RunError
from .model import choose_device
from .run_folder import RunFolder

TEXT = ("bpe_trainer", "tokenizer")
PROCESS = 0.6 * GIB
"""What Python, PyTorch and the other libraries take by themselves; about as much again is a CUDA context."""
GROWTH = 1.6
"""Text is copied once, and its tokens take two bytes each at about 3.5 bytes a token."""


def components(configuration: Configuration) -> Iterator[Finding]:
    """Whether every component that the run takes from the registry can be had, and from whom."""
    device = _device(configuration)
    if device is None:
        yield Finding(
            "problem",
            "training.device",
            f"is {configuration.training.device!r}, and there is none",
            "set training.device=cpu or auto",
        )
        device = "cpu"
    text_backend = configuration.text_backend or configuration.backend
    requests = [(name, text_backend, None) for name in TEXT]
    requests += [
        (name, configuration.backend, None if name in resolved.WITHOUT_TENSORS else device)
        for name in resolved.TRAINING
    ]
    served: dict[str, list[str]] = {}
    for name, backend, where in requests:
        try:
            decision = registry.resolve(name, backend=backend, device=where)
        except (RegistryError, LookupError) as error:
            yield Finding("problem", name, str(error), "choose another backend for it")
            continue
        for one in (decision, *decision.parts):
            if one.preferred:
                reasons = "; ".join(r.reason for r in one.rejected if r.backend == one.preferred)
                found = f"{one.preferred} can't serve it ({reasons}), {one.backend} does"
                yield Finding("warning", one.component, found, f"cs336 explain {one.component} says more")
        for one in decision.parts or (decision,):
            served.setdefault(one.backend, []).append(one.component)
    for backend, names in served.items():
        yield Finding("ok", f"by {backend}", ", ".join(names))


def data(configuration: Configuration) -> Iterator[Finding]:
    """Whether the text is there."""
    for side in ("train", "validation"):
        inputs = getattr(configuration.data, side)
        if inputs is None:
            continue
        if inputs == STANDARD_LIBRARY:
            count = len(standard_library_files())
            yield (
                Finding("ok", f"data.{side}", f"{count} files of Python's standard library")
                if count
                else Finding("problem", f"data.{side}", "this Python has no sources", "name a text file instead")
            )
            continue
        try:
            files = expand(inputs)
        except (OSError, ValueError) as error:
            yield Finding("problem", f"data.{side}", str(error), "download the data, or correct the path")
            continue
        size = sum(path.stat().st_size for path in files)
        yield Finding("ok", f"data.{side}", f"{len(files)} file{'s'[: len(files) > 1]}, {size / 1e6:,.1f} MB")
    chosen = configuration.tokenizer.path
    if chosen is not None:
        missing = [name for name in ("vocab.json", "merges.txt") if not (Path(chosen) / name).is_file()]
        if missing:
            found = f"{chosen} lacks {' and '.join(missing)}"
            yield Finding("problem", "tokenizer.path", found, "cs336 tokenizer train makes such a folder")


def memory(configuration: Configuration) -> Iterator[Finding]:
    """What a training step holds, against what is free."""
    device = _device(configuration) or "cpu"
    fused = _attention_is_fused(configuration, device)
    need = model_costs.training_memory(configuration, fused=fused)
    parts = {name: getattr(need, name) for name in ("weights", "gradients", "optimizer", "activations")}
    detail = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    count = sum(model_costs.parameters(configuration.model).values())
    yield Finding("ok", "parameters", f"{count / 1e6:.2f} M")
    free = _gpu_memory() if device == "cuda" else available_memory()
    total = need.total + PROCESS
    where = "GPU memory" if device == "cuda" else "memory"
    found = f"about {total / GIB:.2f} GiB for training ({detail}, libraries {PROCESS / GIB:.2f})"
    if free is None:
        yield Finding("note", where, f"{found}; how much is free is not known here")
        return
    found += f", {free / GIB:.1f} GiB free"
    if total <= 0.9 * free:
        yield Finding("ok", where, found)
        return
    advice = "raise training.gradient_accumulation"
    if not configuration.training.activation_checkpointing:
        advice += ", set training.activation_checkpointing=true"
    if not fused:
        advice += ", choose a backend whose attention keeps no scores (backend=torch)"
    if need.total - need.activations > 0.9 * free:
        advice = "weights, gradients and optimizer alone are too large: choose a smaller model or a larger machine"
    yield Finding("problem" if total > free else "warning", where, found, advice)


def disk(configuration: Configuration, out: Path) -> Iterator[Finding]:
    """Checkpoints, text and tokens, against what is free."""
    checkpoints = model_costs.checkpoint_bytes(configuration)
    home = RunFolder(out).data(configuration.data.folder)
    corpus = int(GROWTH * _corpus_bytes(configuration))
    places: dict[int, tuple[Path, int]] = {}
    for place, size in ((existing(out), checkpoints), (existing(home), corpus)):
        first, before = places.get(place.stat().st_dev, (place, 0))
        places[place.stat().st_dev] = (first, before + size)
    for place, size in places.values():
        free = shutil.disk_usage(place).free
        found = f"about {size / GIB:.2f} GiB for checkpoints and data in {place}, {free / GIB:.1f} GiB free"
        level = "problem" if size > free else "warning" if size > 0.8 * free else "ok"
        advice = "" if level == "ok" else "make room, lower checkpoint.keep_last, or choose --out on another disk"
        yield Finding(level, "disk", found, advice)


def _device(configuration: Configuration) -> str | None:
    """Where the run would train; None where it could not."""
    try:
        return choose_device(configuration.training.device)
    except RunError:
        return None


def _attention_is_fused(configuration: Configuration, device: str) -> bool:
    """The textbook keeps the square of scores; every other backend's purpose is not to."""
    try:
        return registry.resolve("attention", backend=configuration.backend, device=device).backend != "reference"
    except (RegistryError, LookupError):
        return False


def _gpu_memory() -> int | None:
    """Bytes that are free on the first GPU, or all of it where the driver does not tell."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return next((device.memory for device in detect().cuda_devices), None)


def _corpus_bytes(configuration: Configuration) -> int:
    """Bytes of the input files, or maximum_bytes; 0 where they are not there, which `data` reports."""
    total = 0
    for inputs in (configuration.data.train, configuration.data.validation):
        if inputs == STANDARD_LIBRARY:
            total += sum(path.stat().st_size for path in standard_library_files())
        elif inputs is not None:
            try:
                total += sum(path.stat().st_size for path in expand(inputs))
            except (OSError, ValueError):
                continue
    return min(total, configuration.data.maximum_bytes or total)
