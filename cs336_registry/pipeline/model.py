"""Building the configured model: where it lives, how it starts, what is compiled or recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration import Configuration
from .errors import RunError

ABLATIONS = ("norm", "position", "ffn", "num_kv_heads", "tie_embeddings")
"""Options that only the core's own transformer_lm must know; passed where they are not the default."""


def choose_device(wanted: str) -> str:
    """ "auto" takes the GPU where there is one; "cuda" without a GPU is an error that says why."""
    from ..machine import detect

    machine = detect()
    if wanted == "auto":
        return "cuda" if machine.cuda_devices and torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        why = machine.cuda_problem or f"this torch ({torch.__version__}) is built without CUDA"
        raise RunError(f"training.device = 'cuda', but {why}: set training.device=cpu or auto")
    return wanted


def build(configuration: Configuration, transformer_lm: Callable[..., Any], device: str) -> nn.Module:
    """The model with its first weights, which depend on training.seed alone (not on the device or on earlier use)."""
    settings = configuration.model
    options = {
        name: getattr(settings, name)
        for name in ABLATIONS
        if getattr(settings, name) != type(settings).__dataclass_fields__[name].default
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(configuration.training.seed)
        model = transformer_lm(
            settings.vocab_size,
            settings.context_length,
            settings.d_model,
            settings.num_layers,
            settings.num_heads,
            settings.d_ff,
            settings.rope_theta,
            **options,
        )
    return model.to(device)


def recomputing(model: nn.Module, configuration: Configuration) -> nn.Module:
    """The model, whose blocks recompute their activations in the backward pass where the configuration says so.

    Nothing in a block is random, so there is no state of a generator to keep.
    """
    if configuration.training.activation_checkpointing:
        for layer in model.get_submodule("layers").children():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    return model


def compiled(forward: Callable[..., torch.Tensor], configuration: Configuration) -> Callable[..., torch.Tensor]:
    """The forward pass that training calls, compiled where the configuration says so."""
    return torch.compile(forward) if configuration.training.compile else forward
