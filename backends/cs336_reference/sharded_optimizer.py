"""ZeRO stage 1: each rank steps the parameters it owns and broadcasts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cs336_registry.components.sharded_optimizer import check


class ShardedOptimizer(torch.optim.Optimizer):
    """See the contract. `local` is the optimizer over this rank's own parameters; its groups mirror all groups."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        optimizer_cls: type[torch.optim.Optimizer],
        **kwargs: Any,
    ) -> None:
        check(optimizer_cls)
        self.optimizer_cls, self.settings = optimizer_cls, kwargs
        self.owner: dict[Tensor, int] = {}
        self.load = [0] * dist.get_world_size()
        self.local: torch.optim.Optimizer | None = None
        super().__init__(params, dict(kwargs))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        listed = param_group["params"]
        if isinstance(listed, set):
            raise TypeError("sharded_optimizer: params is a set: pass a list, whose order is the same on every rank")
        # A weight that two layers share may be listed twice.
        unique = [listed] if isinstance(listed, Tensor) else list(dict.fromkeys(listed))
        super().add_param_group(param_group | {"params": unique})
        group = self.param_groups[-1]
        for parameter in group["params"]:
            lightest = self.load.index(min(self.load))
            self.owner[parameter] = lightest
            self.load[lightest] += parameter.numel()
        own = group | {"params": [parameter for parameter in group["params"] if self._is_own(parameter)]}
        if self.local is None:
            self.local = self.optimizer_cls([own], **self.settings)
            self.state = self.local.state
        else:
            self.local.add_param_group(own)
        # Settings that the optimizer class has by default become visible, to learning-rate schedulers for one.
        for name, value in self.local.param_groups[-1].items():
            group.setdefault(name, value)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert self.local is not None
        for local_group, group in zip(self.local.param_groups, self.param_groups, strict=True):
            local_group.update({name: value for name, value in group.items() if name != "params"})
        loss = self.local.step() if closure is None else self.local.step(closure)
        works = [
            dist.broadcast(parameter.detach(), src=owner, async_op=True) for parameter, owner in self.owner.items()
        ]
        for work in works:
            work.wait()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of this rank's own parameters out of `state_dict`, and the settings of all groups."""
        assert self.local is not None
        saved_groups = state_dict["param_groups"]
        sizes, saved_sizes = ([len(group["params"]) for group in g] for g in (self.param_groups, saved_groups))
        if sizes != saved_sizes:
            raise ValueError(
                f"sharded_optimizer: the state dict has groups of {saved_sizes} parameters, this optimizer {sizes}: "
                f"build it over the same parameter groups"
            )
        own_groups = []
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            pairs = zip(group["params"], saved["params"], strict=True)
            own_groups.append(saved | {"params": [index for parameter, index in pairs if self._is_own(parameter)]})
            group.update({name: value for name, value in saved.items() if name != "params"})
        own = {index for group in own_groups for index in group["params"]}
        states = {index: state for index, state in state_dict["state"].items() if index in own}
        self.local.load_state_dict({"state": states, "param_groups": own_groups})
        self.state = self.local.state

    def _is_own(self, parameter: Tensor) -> bool:
        return self.owner[parameter] == dist.get_rank()
