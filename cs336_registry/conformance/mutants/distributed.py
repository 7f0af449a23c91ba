"""Wrong ddp, fsdp and sharded_optimizer: classes of this module, since the processes of the ranks import them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from cs336_reference.ddp import DistributedDataParallel, GradientAverager
from cs336_reference.fsdp import FullyShardedDataParallel
from cs336_reference.sharded_optimizer import ShardedOptimizer

from . import mutation


class Summed(DistributedDataParallel):
    def finish_gradient_synchronization(self):
        super().finish_gradient_synchronization()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(dist.get_world_size())


class NeverBroadcast(DistributedDataParallel):
    def __init__(self, module):
        torch.nn.Module.__init__(self)
        self.module = module
        self.averager = GradientAverager(module.parameters())


class NeverSynchronised(DistributedDataParallel):
    def __init__(self, module):
        super().__init__(module)
        self.averager = GradientAverager([])


class FirstParameterForgotten(DistributedDataParallel):
    def __init__(self, module):
        super().__init__(module)
        self.averager = GradientAverager(list(module.parameters())[1:])


class PartsScaled(FullyShardedDataParallel):
    def finish_gradient_synchronization(self):
        super().finish_gradient_synchronization()
        for parameter in self.weights:
            if parameter.grad is not None:
                parameter.grad.mul_(dist.get_world_size())


class ComputeDtypeIgnored(FullyShardedDataParallel):
    def __init__(self, module, compute_dtype=None):
        super().__init__(module)


class SmallParametersForgotten(FullyShardedDataParallel):
    def __init__(self, module, compute_dtype=None):
        super().__init__(module, compute_dtype)
        self.averager = GradientAverager([])


class NotBroadcastAfterTheStep(ShardedOptimizer):
    def step(self, closure=None):
        return self.local.step() if closure is None else self.local.step(closure)


class NothingSharded(ShardedOptimizer):
    def _is_own(self, parameter):
        return True


class LaterGroupsForgotten(ShardedOptimizer):
    def step(self, closure=None):
        for group in self.local.param_groups[1:]:
            group["lr"] = 0.0
        for group in self.param_groups[1:]:
            group["lr"] = 0.0
        return super().step(closure)


class StateNotLoaded(ShardedOptimizer):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "state": {}})


for _component, _name, _bug, _wrong in (
    ("ddp", "gradients_summed", "gradients are summed over the ranks, not averaged", Summed),
    ("ddp", "weights_not_broadcast", "rank 0's weights are not sent to the others", NeverBroadcast),
    ("ddp", "gradients_not_synchronised", "gradients stay with their rank", NeverSynchronised),
    ("ddp", "first_parameter_forgotten", "the first parameter's gradient is not averaged", FirstParameterForgotten),
    ("fsdp", "parts_summed", "the gradients of the parts are summed, not averaged", PartsScaled),
    ("fsdp", "compute_dtype_ignored", "compute_dtype is ignored", ComputeDtypeIgnored),
    ("fsdp", "small_parameters_forgotten", "gradients of unsharded parameters stay local", SmallParametersForgotten),
    ("sharded_optimizer", "parts_not_broadcast", "owners keep their step for themselves", NotBroadcastAfterTheStep),
    ("sharded_optimizer", "nothing_sharded", "every rank keeps the whole state", NothingSharded),
    ("sharded_optimizer", "later_groups_forgotten", "only the first group takes steps", LaterGroupsForgotten),
    ("sharded_optimizer", "sharded_state_not_loaded", "load_state_dict drops the moments", StateNotLoaded),
):

    def _make(textbook, wrong=_wrong):
        return wrong

    _make.__name__ = _name
    mutation(_component, _bug)(_make)
