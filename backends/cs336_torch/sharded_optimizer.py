"""torch.distributed.optim.ZeroRedundancyOptimizer, whose state dict is this rank's own as the contract has it.

Its own state dict is a whole one, for which every rank's states are first sent to one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cs336_registry.components.sharded_optimizer import check

with warnings.catch_warnings():
    # Importing the package compiles functional optimizers with torch.jit.script, which PyTorch itself deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """See the contract. `optim` is the optimizer over this rank's own parameters."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        optimizer_cls: type[torch.optim.Optimizer],
        **kwargs: Any,
    ) -> None:
        check(optimizer_cls)
        super().__init__(params, optimizer_cls, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """This rank's states under the indices of all parameters."""
        groups = torch.optim.Optimizer.state_dict(self)["param_groups"]
        states = {index: self.optim.state.get(parameter) for index, parameter in self._numbered(groups)}
        return {"state": {index: state for index, state in states.items() if state}, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's states; `state_dict` stays as it is."""
        super().load_state_dict(state_dict | {"state": dict(state_dict["state"])})
        for group in self.optim.param_groups:
            for parameter in group["params"] if group.get("fused") else ():
                # Fused kernels count on the parameter's device, where PyTorch puts every count on the CPU.
                state = self.optim.state[parameter]
                state.update({"step": state["step"].to(parameter.device)} if "step" in state else {})

    def _numbered(self, groups: list[dict[str, Any]]) -> Iterator[tuple[int, Tensor]]:
        for numbers, group in zip(groups, self.param_groups, strict=True):
            yield from zip(numbers["params"], group["params"], strict=True)
