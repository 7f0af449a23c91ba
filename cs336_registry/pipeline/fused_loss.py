"""The training loss where no logits are kept: taken from hidden states, for one process with a GPU.

A large vocabulary's logits are most of a step's memory, and a product with an odd number of words is slow. Where one
backend serves both losses, its linear_cross_entropy takes the place of the projection to logits and cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import cs336_registry as registry

from ..nn import TransformerLM
from .configuration import Configuration
from .process_group import ProcessGroup
from .resolved import Resolved, resolve

NAME = "linear_cross_entropy"


def components_of(configuration: Configuration, device: str, group: ProcessGroup, components: Resolved) -> Resolved:
    """linear_cross_entropy where it is to be taken; elsewhere nothing.

    Several processes exchange gradients or weights where the model is called, hence logits. The textbook gains nothing.
    """
    plain = components.decisions["cross_entropy"]["backend"]
    names: tuple[str, ...] = ()
    if device == "cuda" and group.alone and plain != "reference":
        served = registry.resolve(NAME, backend=configuration.backend, device=device).backend
        names = (NAME,) if served == plain else ()
    return resolve(configuration.backend, device, names)


def from_hidden_states(
    model: nn.Module, components: Resolved, configuration: Configuration
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The loss of (inputs, targets), both (batch, seq); None where `components` or the model have no such way."""
    if NAME not in components.callables or not isinstance(model, TransformerLM):
        return None
    linear_cross_entropy = components[NAME]
    narrow = torch.bfloat16 if configuration.training.precision == "bfloat16" else None

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        hidden, weight = model.hidden_states(inputs), model.lm_head.weight
        # Autocast narrows the factors of products it knows, which this operation is not one of.
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_cross_entropy(hidden.to(narrow or hidden.dtype), weight.to(narrow or weight.dtype), targets)

    return loss
