"""A trained model from a run's folder: the weights of one checkpoint, the tokenizer and the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import model as models
from . import tokenization
from .checkpoints import Checkpoints
from .configuration import Configuration, from_dict
from .errors import MismatchError
from .resolved import Resolved, resolve
from .run_folder import RunFolder
from .tokenization import RunTokenizer

COMPONENTS = ("transformer_lm", "save_checkpoint", "load_checkpoint", "generate")


@dataclass(frozen=True)
class TrainedModel:
    """The model of a run after `step` optimizer steps, in evaluation mode, with what it was trained with."""

    folder: RunFolder
    step: int
    configuration: Configuration
    model: torch.nn.Module
    tokenizer: RunTokenizer
    components: Resolved
    device: str


def load(path: Path, *, checkpoint: str = "last", backend: str | None = None, device: str = "cpu") -> TrainedModel:
    """Read the run in `path`. checkpoint: "last", "best" or the number of a step.

    Raises FileNotFoundError where there is no run or no such checkpoint, and MismatchError where the tokenizer is not
    the one that the model was trained with.
    """
    folder = RunFolder(path)
    folder.record()
    device = models.choose_device(device)
    components = resolve(backend, device, COMPONENTS)
    checkpoints = Checkpoints(
        folder.checkpoints,
        components["save_checkpoint"],
        components["load_checkpoint"],
        keep_last=1,
        keep_best=True,
    )
    step = chosen_step(checkpoints, checkpoint)
    state = checkpoints.state(step)
    configuration = from_dict(state["configuration"], str(checkpoints.path(step) / "state.json"))
    tokenizer = read_tokenizer(configuration, folder, backend)
    if tokenizer.fingerprint != state["tokenizer"]:
        raise MismatchError(
            f"{path} was trained with tokenizer {state['tokenizer']}, {tokenizer.folder} holds "
            f"{tokenizer.fingerprint}: put the old tokenizer back"
        )
    model = models.build(configuration, components["transformer_lm"], device)
    checkpoints.load(step, model, None)
    model.eval().requires_grad_(False)
    return TrainedModel(folder, step, configuration, model, tokenizer, components, device)


def chosen_step(checkpoints: Checkpoints, wanted: str) -> int:
    """The step that `wanted` ("last", "best", "100") names among those that are saved."""
    steps = checkpoints.steps()
    if not steps:
        raise FileNotFoundError(f"there is no checkpoint in {checkpoints.folder}: train the run first")
    if wanted == "last":
        return steps[-1]
    if wanted == "best":
        best = checkpoints.state(steps[-1])["best"]
        if best and best[0] in steps:
            return best[0]
        raise FileNotFoundError(
            f"no best checkpoint is kept in {checkpoints.folder} (saved: {_listed(steps)}): set "
            f"checkpoint.keep_best=true and evaluate at the steps that are saved, or use --checkpoint last"
        )
    if not wanted.isdecimal() or int(wanted) not in steps:
        raise FileNotFoundError(
            f"there is no checkpoint {wanted!r} in {checkpoints.folder}: use last, best or a step of {_listed(steps)}"
        )
    return int(wanted)


def read_tokenizer(configuration: Configuration, folder: RunFolder, backend: str | None = None) -> RunTokenizer:
    """The tokenizer of a run, from its own folder or from where the configuration says."""
    chosen = configuration.tokenizer.path
    home = Path(chosen) if chosen else folder.data(configuration.data.folder) / "tokenizer"
    if not home.is_dir():
        raise FileNotFoundError(
            f"{folder.path} was trained with the tokenizer in {home}, which is not there: run from the folder that "
            f"the run was started in, or put it back"
        )
    return tokenization.read(home, backend or configuration.text_backend)


def weights(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The state dict with the course's names, on the CPU, whatever wraps the model."""
    state: Mapping[str, Any] = getattr(model, "_orig_mod", model).state_dict()
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
