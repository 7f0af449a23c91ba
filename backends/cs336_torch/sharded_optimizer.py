"""torch.distributed.optim.ZeroRedundancyOptimizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cs336_registry.components.sharded_optimizer import check

with warnings.catch_warnings():
    # Importing the package compiles functional optimizers with torch.jit.script, which PyTorch itself deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """See the contract. State dicts are those of ZeroRedundancyOptimizer: whole, after `consolidate_state_dict()`."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        optimizer_cls: type[torch.optim.Optimizer],
        **kwargs: Any,
    ) -> None:
        check(optimizer_cls)
        super().__init__(params, optimizer_cls, **kwargs)
