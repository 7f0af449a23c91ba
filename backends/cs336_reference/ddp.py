"""Data parallelism: all-reduce each gradient as soon as backward has made it, and wait for all of them at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from cs336_registry.components.ddp import check


class DistributedDataParallel(torch.nn.Module):
    """See the contract. One all-reduce per parameter."""

    def __init__(self, module: torch.nn.Module) -> None:
        check(module)
        super().__init__()
        self.module = module
        broadcast_from_first_rank([*module.parameters(), *module.buffers()])
        self.averager = GradientAverager(module.parameters())

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)

    def finish_gradient_synchronization(self) -> None:
        """Wait until every gradient is the average over all ranks."""
        self.averager.finish()


def broadcast_from_first_rank(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=0)


class GradientAverager:
    """Averages gradients over the ranks while backward still runs.

    Collectives must start in the same order on every rank, and ranks may not use the same parameters. So the order is
    fixed: the reverse of the parameters' own, which is about the order backward reaches them in. A gradient that is
    ready waits for its turn; what never got ready takes part at the end.
    """

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad][::-1]
        self.ready: set[Parameter] = set()
        self.launched: list[tuple[Parameter, dist.Work | None]] = []
        for parameter in self.parameters:
            parameter.register_hook(lambda gradient, parameter=parameter: self._before_accumulation(parameter))
            parameter.register_post_accumulate_grad_hook(self._after_accumulation)

    def _before_accumulation(self, parameter: Parameter) -> None:
        # A second backward pass adds to the gradient, which must not happen while it is being reduced.
        if parameter in self.ready:
            self.finish()

    def _after_accumulation(self, parameter: Parameter) -> None:
        self.ready.add(parameter)
        while len(self.launched) < len(self.parameters) and self.parameters[len(self.launched)] in self.ready:
            self._launch_next()

    def _launch_next(self) -> None:
        parameter = self.parameters[len(self.launched)]
        work = dist.all_reduce(parameter.grad, async_op=True)
        self.launched.append((parameter, work))

    def finish(self) -> None:
        without_gradient = [parameter for parameter in self.parameters if parameter.grad is None]
        for parameter in without_gradient:
            parameter.grad = torch.zeros_like(parameter)
        while len(self.launched) < len(self.parameters):
            self._launch_next()
        for parameter, work in self.launched:
            if work is not None:
                work.wait()
            parameter.grad.div_(dist.get_world_size())
        self._forget_unused(without_gradient)
        self.ready.clear()
        self.launched.clear()

    def _forget_unused(self, without_gradient: list[Parameter]) -> None:
        """Where no rank used a parameter it has no gradient, so that no optimizer decays or moves it."""
        if not self.parameters:
            return
        used = torch.tensor([parameter in self.ready for parameter in self.parameters], dtype=torch.int32)
        used = used.to(self.parameters[0].device)
        dist.all_reduce(used)
        for parameter, count in zip(self.parameters, used.tolist(), strict=True):
            if count == 0 and parameter in without_gradient:
                parameter.grad = None
