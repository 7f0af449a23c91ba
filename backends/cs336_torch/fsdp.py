"""PyTorch's fully_shard (FSDP2): one group per large layer, one for all that is left.

Layers that share a weight are left to the last group, as FSDP2 does not share a weight between groups.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from cs336_reference.ddp import broadcast_from_first_rank
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from cs336_registry.components.fsdp import check, is_sharded


class FullyShardedDataParallel(torch.nn.Module):
    """See the contract. All parameters are cut, the small ones too, and compute_dtype holds for all layers."""

    def __init__(self, module: torch.nn.Module, compute_dtype: torch.dtype | None = None) -> None:
        check(module, compute_dtype)
        super().__init__()
        broadcast_from_first_rank([*module.parameters(), *module.buffers()])
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, cast_forward_inputs=True)
        layers = [layer for layer in module.modules() if is_sharded(layer)]
        uses = Counter(layer.weight for layer in layers)
        for layer in layers:
            if uses[layer.weight] == 1:
                fully_shard(layer, mp_policy=policy)
        # By default the last group stays whole after a forward pass, and with it what `parameters()` gives.
        self.module = fully_shard(module, mp_policy=policy, reshard_after_forward=True)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def finish_gradient_synchronization(self) -> None:
        """Nothing is left to do: PyTorch waits for the reductions at the end of backward."""

    def gather_full_parameters(self) -> dict[str, Tensor]:
        """The state dict of the whole model under its own names, on every rank; all ranks must call it."""
        return get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True))
