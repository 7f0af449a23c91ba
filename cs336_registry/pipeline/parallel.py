"""A model and its optimizer, on one process or spread over several.

    strategy                     each process keeps                         components
    ddp                          everything, and averages gradients         ddp
    ddp with shard_optimizer     everything but most optimizer states       ddp, sharded_optimizer
    fsdp                         its rows of weights, gradients, states     fsdp

Optimizer and clipping always get plain tensors, those in this process's memory, so every backend's serve every
strategy. What is a whole and what a part of one is known here alone.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from ..components.fsdp import is_sharded
from .configuration import Configuration
from .errors import MismatchError
from .model import compiled
from .process_group import ProcessGroup
from .resolved import Resolved, resolve
from .sharded_checkpoint import optimizer_tensors, weights

EPS = 1e-6
"""As in the contract of gradient_clipping."""


class SavedTensors(Protocol):
    """What a checkpoint holds: whole shapes and dtypes by name, and `read`, which fills tensors or parts of them."""

    @property
    def properties(self) -> Mapping[str, tuple[torch.Size, torch.dtype]]: ...

    def read(self, targets: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True, eq=False)
class Part:
    """What this process keeps of one parameter. cut: only its rows of a whole of `shape`."""

    name: str
    parameter: nn.Parameter
    local: Tensor
    shape: torch.Size
    cut: bool


def components_of(configuration: Configuration, device: str, group: ProcessGroup) -> Resolved:
    """What the strategy takes from the registry; nothing for a process alone."""
    settings = configuration.parallel
    names = (settings.strategy, *(["sharded_optimizer"] if settings.shard_optimizer else []))
    return resolve(configuration.backend, device, () if group.alone else names)


class Parallel:
    """`forward` is for training, `module` for evaluation; `optimizer` steps the local tensors of `parts`."""

    def __init__(
        self,
        model: nn.Module,
        configuration: Configuration,
        components: Resolved,
        strategy: Resolved,
        group: ProcessGroup,
    ) -> None:
        self.group, self._components, self._model = group, components, model
        whole = dict(model.named_parameters())
        cut = [layer.weight for layer in model.modules() if is_sharded(layer)] if "fsdp" in strategy.callables else []
        cut_names = {name for name, parameter in whole.items() if any(parameter is weight for weight in cut)}
        self._wrapped: Any = None if group.alone else strategy[configuration.parallel.strategy](model)
        self.module = self._wrapped if "fsdp" in strategy.callables else model
        self.forward = compiled(model if group.alone else self._wrapped, configuration)
        self.parts = [
            _part(name, parameter, whole[name].shape, name in cut_names) for name, parameter in model.named_parameters()
        ]
        self._mesh = None
        if any(part.cut for part in self.parts):
            self._mesh = init_device_mesh(self.parts[0].local.device.type, (group.world_size,))
        settings = configuration.optimizer
        adamw, local = components["adamw"], [part.local for part in self.parts]
        options = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
        sharded = strategy.callables.get("sharded_optimizer")
        self.optimizer: Any = sharded(local, adamw, **options) if sharded else adamw(local, **options)

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a backward pass: gradients are sent with the last of a step alone, where the backend can wait."""
        wait = None if last else getattr(self._wrapped, "no_sync", None)
        return wait() if wait else contextlib.nullcontext()

    def finish_gradients(self) -> None:
        """After a backward pass: every gradient is the average over the processes."""
        if self._wrapped is not None:
            self._wrapped.finish_gradient_synchronization()

    def clip(self, limit: float) -> Tensor:
        """Clip by the norm of all gradients of all processes, and return it."""
        for part in self.parts:
            if isinstance(part.parameter.grad, DTensor):
                part.local.grad = part.parameter.grad.to_local()
        clip = self._components["gradient_clipping"]
        if self._mesh is None:
            return clip([part.local for part in self.parts], limit)
        device = self.parts[0].local.device
        here = clip([part.local for part in self.parts if part.cut], math.inf).to(device)
        everywhere = clip([part.local for part in self.parts if not part.cut], math.inf).to(device)
        norm = (self.group.total(here.square()) + everywhere.square()).sqrt()
        factor = torch.where(norm > limit, limit / (norm + EPS), 1.0)
        for part in self.parts:
            if part.local.grad is not None:
                part.local.grad.mul_(factor)
        return norm

    def step(self) -> None:
        """Step and forget the gradients."""
        self.optimizer.step()
        for part in self.parts:
            part.parameter.grad = part.local.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """What this process has of the weights ("model.NAME") and of the optimizer's states ("optimizer.NAME.exp_avg"),
        parts as DTensors over the same memory: what torch.distributed.checkpoint saves.
        """
        found = self._weights()
        states = self.optimizer.state_dict()["state"]
        for index, part in enumerate(self.parts):
            named = optimizer_tensors(part.name, states.get(index, {}))
            found |= {name: self._distributed(part, tensor) for name, tensor in named.items()}
        return found

    def load(self, saved: SavedTensors) -> None:
        """Take the weights and states of a checkpoint that any number of processes wrote."""
        targets, properties = self._weights(), saved.properties
        states: list[dict[str, Tensor]] = []
        for part in self.parts:
            prefix = f"optimizer.{part.name}."
            states.append({})
            for name, (shape, dtype) in properties.items():
                if name.startswith(prefix):
                    size = part.local.shape if shape == part.shape else shape
                    # Scalars (the number of steps) stay on the CPU, where PyTorch keeps them.
                    device = part.local.device if shape else "cpu"
                    states[-1][name.removeprefix(prefix)] = torch.empty(size, dtype=dtype, device=device)
                    targets[name] = self._distributed(part, states[-1][name.removeprefix(prefix)])
        missing, foreign = targets.keys() - properties.keys(), properties.keys() - targets.keys()
        if missing or foreign:
            raise MismatchError(f"it lacks {sorted(missing)[:3]} and has {sorted(foreign)[:3]} beyond this model")
        saved.read(targets)
        groups = self.optimizer.state_dict()["param_groups"]
        filled = {index: state for index, state in enumerate(states) if state}
        self.optimizer.load_state_dict({"state": filled, "param_groups": groups})

    def _weights(self) -> dict[str, Tensor]:
        parts = {f"model.{part.name}": self._distributed(part, part.local.detach()) for part in self.parts}
        return weights(self._model) | parts

    def _distributed(self, part: Part, value: Tensor) -> Tensor:
        """`value`, which is like `part.local` or whole on every process, as what it is a part of."""
        if not (part.cut and value.shape == part.local.shape):
            return value
        stride = torch.empty(part.shape, device="meta").stride()
        return DTensor.from_local(value, self._mesh, [Shard(0)], run_check=False, shape=part.shape, stride=stride)


def _part(name: str, parameter: nn.Parameter, shape: torch.Size, cut: bool) -> Part:
    if not isinstance(parameter, DTensor):
        return Part(name, parameter, parameter, shape, cut)
    local = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
    return Part(name, parameter, local, shape, cut=True)
