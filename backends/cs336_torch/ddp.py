"""torch.nn.parallel.DistributedDataParallel: gradients in buckets, reduced by its own C++ hooks during backward."""

from __future__ import annotations

import torch

from cs336_registry.components.ddp import check


class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
    """See the contract. Every rank must use every parameter that needs a gradient."""

    def __init__(self, module: torch.nn.Module) -> None:
        check(module)
        super().__init__(module, broadcast_buffers=False)

    def finish_gradient_synchronization(self) -> None:
        """Nothing is left to do: PyTorch waits for the reductions at the end of backward."""
