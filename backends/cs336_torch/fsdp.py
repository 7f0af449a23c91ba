"""PyTorch's fully_shard (FSDP2): one group per large layer, one for all that is left.

Layers that share a weight are left to the last group, as FSDP2 does not share a weight between groups.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map_only

from cs336_registry.components.fsdp import check, is_sharded


class FullyShardedDataParallel(torch.nn.Module):
    """See the contract. All parameters are cut, the small ones too, and compute_dtype holds for all layers."""

    def __init__(self, module: torch.nn.Module, compute_dtype: torch.dtype | None = None) -> None:
        check(module, compute_dtype)
        super().__init__()
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        # By default the mesh is of the accelerator that the machine has, wherever the model is.
        device = next((parameter.device.type for parameter in module.parameters()), "cpu")
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, cast_forward_inputs=True)
        layers = [layer for layer in module.modules() if is_sharded(layer)]
        uses = Counter(layer.weight for layer in layers)
        for layer in {*layers, module}:
            layer.register_forward_hook(_without_views)
        for layer in layers:
            if uses[layer.weight] == 1:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        # By default the last group stays whole after a forward pass, and with it what `parameters()` gives.
        self.module = fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def finish_gradient_synchronization(self) -> None:
        """Nothing is left to do: PyTorch waits for the reductions at the end of backward."""

    def gather_full_parameters(self) -> dict[str, Tensor]:
        """The state dict of the whole model under its own names, on every rank; all ranks must call it."""
        return get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True))


def _without_views(layer: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """Copies of views, for a result as it goes to FSDP2, which hangs the backward gather on it (and warns of views).

    An in-place operation on a view, such as a residual `x += y`, would drop that without a word.
    """
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, output)
