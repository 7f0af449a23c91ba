"""torch.nn.parallel.DistributedDataParallel: gradients in buckets, reduced by its own C++ hooks during backward."""

from __future__ import annotations

import inspect

import torch

from cs336_registry.components.ddp import check


class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
    """See the contract. Every rank must use every parameter that needs a gradient."""

    def __init__(self, module: torch.nn.Module) -> None:
        check(module)
        # PyTorch 2.13 renames the option that keeps buffers from being sent before every forward pass.
        options = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        super().__init__(module, **{name: False})

    def finish_gradient_synchronization(self) -> None:
        """Nothing is left to do: PyTorch waits for the reductions at the end of backward."""
