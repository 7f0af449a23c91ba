"""Fully sharded data parallelism with hooks: gather a weight before its layer, drop it after, scatter its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from cs336_registry.components.fsdp import check, is_sharded

from .ddp import GradientAverager, broadcast_from_first_rank

# PyTorch 2.13 renames both; older releases have the old names alone.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class FullyShardedDataParallel(torch.nn.Module):
    """See the contract. The order of the first forward pass tells which weight to fetch ahead of the next layer."""

    def __init__(self, module: torch.nn.Module, compute_dtype: torch.dtype | None = None) -> None:
        check(module, compute_dtype)
        super().__init__()
        self.module = module
        self.compute_dtype = compute_dtype
        broadcast_from_first_rank([*module.parameters(), *module.buffers()])
        self.weights: dict[Parameter, ShardedWeight] = {}
        self.forward_order: list[ShardedWeight] = []
        self.saved_order: list[ShardedWeight] = []
        replaced: dict[Parameter, ShardedWeight] = {}
        for layer in [layer for layer in module.modules() if is_sharded(layer)]:
            whole = layer.weight
            # Layers that share a weight share its part.
            if whole not in replaced:
                replaced[whole] = ShardedWeight(whole, compute_dtype or whole.dtype)
            weight = replaced[whole]
            layer.weight = weight.part
            self.weights[weight.part] = weight
            self._hook(layer, weight)
        self.averager = GradientAverager(p for p in module.parameters() if p not in self.weights)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        for weight in self.weights.values():
            weight.drop_fetched()
        self.saved_order.clear()
        return self.module(*inputs, **options)

    def finish_gradient_synchronization(self) -> None:
        """Wait until every gradient is there: the averages, each part with its rank."""
        for weight in self.weights.values():
            weight.finish_reductions()
        self.averager.finish()

    def gather_full_parameters(self) -> dict[str, Tensor]:
        """The state dict of the whole model under its own names, on every rank; all ranks must call it."""
        whole = {part: weight.gathered(weight.part.dtype).clone() for part, weight in self.weights.items()}
        state = self.module.state_dict(keep_vars=True)
        return {name: whole[value] if value in whole else value.detach().clone() for name, value in state.items()}

    def _hook(self, layer: torch.nn.Module, weight: ShardedWeight) -> None:
        """Around the layer's forward: its whole weight in place of the part, and in what autograd saves a promise."""
        open_contexts: list[Any] = []

        def before(layer: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
            weight.fetch()
            self._fetch_next(weight)
            whole = Gather.apply(weight.part, weight)
            context = torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: self._pack(tensor, whole, weight), self._unpack
            )
            context.__enter__()
            open_contexts.append(context)
            # What stands in __dict__ goes before the registered parameters.
            layer.__dict__["weight"] = whole
            if self.compute_dtype is None:
                return None
            for name, parameter in layer.named_parameters(recurse=False):
                if name != "weight":
                    layer.__dict__[name] = parameter.to(self.compute_dtype)
            return tuple(map(self._cast, inputs)), {name: self._cast(value) for name, value in options.items()}

        def after(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
            open_contexts.pop().__exit__(None, None, None)
            for name in layer._parameters:
                layer.__dict__.pop(name, None)

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, always_call=True)

    def _cast(self, value: Any) -> Any:
        return value.to(self.compute_dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _fetch_next(self, weight: ShardedWeight) -> None:
        if weight not in self.forward_order:
            self.forward_order.append(weight)
            return
        following = self.forward_order.index(weight) + 1
        if following < len(self.forward_order):
            self.forward_order[following].fetch()

    def _pack(self, tensor: Tensor, whole: Tensor, weight: ShardedWeight) -> Any:
        """Autograd saves a view of the whole weight for backward: keep its shape alone, so that the weight can go."""
        if tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            return tensor
        self.saved_order.append(weight)
        return Promise(weight, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, Promise):
            return saved
        if saved.weight in self.saved_order:
            # Backward goes the other way: what was saved before this is needed next.
            while self.saved_order.pop() is not saved.weight:
                continue
            if self.saved_order:
                self.saved_order[-1].fetch()
        return saved.weight.whole().as_strided(saved.size, saved.stride, saved.offset)


class Promise:
    """Stands for a view of a whole weight between forward and backward."""

    def __init__(self, weight: ShardedWeight, size: torch.Size, stride: tuple[int, ...], offset: int) -> None:
        self.weight, self.size, self.stride, self.offset = weight, size, stride, offset


class ShardedWeight:
    """One weight, cut along its first dimension: this rank's part, and what is on its way over the network.

    Parts have ceil(rows / world size) rows on the network, the last ones padded, and only their own rows in `part`.
    """

    def __init__(self, whole: Parameter, compute_dtype: torch.dtype) -> None:
        self.compute_dtype = compute_dtype
        self.world_size, rank = dist.get_world_size(), dist.get_rank()
        self.shape = whole.shape
        self.rows_of_part = -(-len(whole) // self.world_size)
        own = whole.detach()[rank * self.rows_of_part : (rank + 1) * self.rows_of_part]
        self.part = Parameter(own.clone(), requires_grad=whole.requires_grad)
        self.fetched: tuple[Any, Tensor, Tensor] | None = None
        self.reductions: list[tuple[Any, Tensor, Tensor]] = []

    def fetch(self) -> None:
        """Start gathering, unless that is under way."""
        if self.fetched is None:
            self.fetched = self._gather(self.compute_dtype)

    def whole(self) -> Tensor:
        """The whole weight in the compute dtype, gathered now or ahead of time."""
        self.fetch()
        assert self.fetched is not None
        work, whole, _ = self.fetched
        work.wait()
        self.fetched = None
        return whole[: self.shape[0]]

    def gathered(self, dtype: torch.dtype) -> Tensor:
        work, whole, _ = self._gather(dtype)
        work.wait()
        return whole[: self.shape[0]]

    def drop_fetched(self) -> None:
        """Forget what was fetched and not used: the optimizer may have changed it since."""
        if self.fetched is not None:
            self.fetched[0].wait()
            self.fetched = None

    def reduce(self, gradient: Tensor) -> None:
        """Start averaging a gradient of the whole weight; this rank's part of it arrives later."""
        # Divided before the sum, so that float16 sums do not overflow where averages would not.
        sent = self._padded(gradient / self.world_size, self.world_size * self.rows_of_part)
        received = sent.new_empty(self.rows_of_part, *self.shape[1:])
        self.reductions.append((reduce_scatter(received, sent, async_op=True), received, sent))

    def finish_reductions(self) -> None:
        for work, received, _ in self.reductions:
            work.wait()
            gradient = received[: len(self.part)].to(self.part.dtype)
            self.part.grad = gradient if self.part.grad is None else self.part.grad + gradient
        self.reductions.clear()

    def _gather(self, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor]:
        sent = self._padded(self.part.detach().to(dtype), self.rows_of_part)
        whole = sent.new_empty(self.world_size * self.rows_of_part, *self.shape[1:])
        return all_gather(whole, sent, async_op=True), whole, sent

    def _padded(self, tensor: Tensor, rows: int) -> Tensor:
        if len(tensor) == rows:
            return tensor.contiguous()
        return torch.cat([tensor, tensor.new_zeros(rows - len(tensor), *self.shape[1:])])


class Gather(torch.autograd.Function):
    """From this rank's part to the whole weight; backward, from the whole gradient to this rank's part of the average.

    Backward hands autograd no gradient: it is still on its way then, and `finish_reductions` puts it into `part.grad`.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, weight: ShardedWeight) -> Tensor:
        ctx.weight = weight
        return weight.whole()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.weight.reduce(gradients[0])
        return None, None
