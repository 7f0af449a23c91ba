"""Data-parallel training: every rank holds the whole model, gradients are averaged while backward still runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload
from ..ranks import run_on_ranks

if TYPE_CHECKING:
    import torch

WORLD_SIZE = 2


def ddp(module: torch.nn.Module) -> Any:
    """A module that computes what `module` computes and averages its gradients over the ranks of the default group.

    gradient = (1 / world size) * sum over ranks of each rank's own gradient. At construction, parameters and buffers
    become rank 0's. The reduction of a gradient starts as soon as backward has made it and runs beside the rest of
    backward; call `finish_gradient_synchronization()` after backward and before the optimizer's step. A weight that two
    layers share is reduced once. Parameters that need no gradient, or that no rank used, keep the gradient they had.
    `module` is the wrapped module. Every rank must run as many backward passes as the others.
    Raises TypeError where `module` is no nn.Module, RuntimeError without a process group.
    Source: Li et al. 2020, "PyTorch Distributed", https://arxiv.org/abs/2006.15704.
    """
    raise NotImplementedError


def check(module: Any) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    check_module("ddp", module)


def check_module(name: str, module: Any) -> None:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name}: module is a {type(module).__name__}: pass a torch.nn.Module")
    check_process_group(name)


def check_process_group(name: str) -> None:
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            f"{name}: there is no process group: start the ranks with torchrun and call "
            f"torch.distributed.init_process_group first"
        )


def example(make: ArgumentMaker, kind: str) -> torch.nn.Module:
    """A small model of token ids; `kind` says what is special about it. Where dtypes mix, no LayerNorm has to."""
    import torch

    vocab, width = 11, 6
    norm = torch.nn.Identity() if "mixed" in kind else torch.nn.LayerNorm(9)
    layers: list[torch.nn.Module] = [torch.nn.Embedding(vocab, width), torch.nn.Linear(width, 9), norm]
    layers += [torch.nn.ReLU(), torch.nn.Linear(9, width), torch.nn.Linear(width, vocab, bias=False)]
    model = torch.nn.Sequential(*layers)
    if "tied" in kind:
        model[5].weight = model[0].weight
    if kind == "frozen":
        model[1].bias.requires_grad_(False)
        model[4].weight.requires_grad_(False)
    if kind == "unused":
        model.register_parameter("unused", torch.nn.Parameter(torch.zeros(5, 3)))
    model.register_buffer("constants", torch.zeros(4))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(make.normal(*tensor.shape, scale=0.5))
    return model.to(make.device, make.dtype)


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    steps, batch, length = case.sizes.get("steps", 3), case.sizes.get("batch", 4), 5
    return {
        "module": example(make, case.sizes.get("kind", "plain")),
        "token_ids": make.integers(steps, batch, length, high=11),
        "targets": make.normal(steps, batch, length, 11),
    }


def observe(implementation: Callable[..., Any], arguments: Arguments) -> Any:
    """All weights on every rank after training on halves of the batches; the oracle trains on whole ones."""
    if implementation is oracle:
        trained = train(0, 1, oracle, arguments)
        return [trained] * WORLD_SIZE
    return run_on_ranks(_train, implementation, arguments)


def _train(rank: int, implementation: Callable[..., Any], arguments: Arguments) -> Any:
    return train(rank, WORLD_SIZE, implementation, arguments)


def train(rank: int, world_size: int, implementation: Callable[..., Any], arguments: Arguments) -> dict[str, Any]:
    """Some steps of SGD on this rank's part of each batch; the state dict at the end."""
    import torch

    module = arguments["module"]
    with torch.no_grad():
        # Rank 0's values must win.
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(rank)
    wrapped = implementation(module)
    optimizer = torch.optim.SGD(
        [parameter for parameter in wrapped.parameters() if parameter.requires_grad], lr=0.1, momentum=0.9
    )
    for token_ids, targets in zip(arguments["token_ids"], arguments["targets"], strict=True):
        optimizer.zero_grad()
        part = slice(rank, None, world_size)
        loss = ((wrapped(token_ids[part]) - targets[part]) ** 2).mean()
        loss.backward()
        wrapped.finish_gradient_synchronization()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in wrapped.module.state_dict().items()}


def oracle(module: torch.nn.Module) -> Any:
    """No wrapping at all: one process that sees the whole batch."""
    import torch

    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any) -> Any:
            return self.module(*inputs)

        def finish_gradient_synchronization(self) -> None:
            return None

    return Alone()


def gradients_are_averaged(ddp, make: ArgumentMaker) -> None:
    run_on_ranks(_average, ddp, make.seed)


def _average(rank: int, ddp: Callable[..., Any], seed: int) -> None:
    """A linear model's gradient is its input: the average over ranks is known without any other implementation."""
    import torch

    model: Any = torch.nn.Linear(3, 1, bias=False)
    wrapped = ddp(model)
    wrapped(torch.full((1, 3), float(rank + 1))).sum().backward()
    wrapped.finish_gradient_synchronization()
    assert_nearly_equal(model.weight.grad, torch.full((1, 3), 1.5), what="the gradient averaged over two ranks")


def gradients_accumulate(ddp, make: ArgumentMaker) -> None:
    run_on_ranks(_accumulate, ddp, make.seed)


def _accumulate(rank: int, ddp: Callable[..., Any], seed: int) -> None:
    import torch

    wrapped = ddp(torch.nn.Linear(3, 1, bias=False))
    for factor in (1.0, 10.0):
        wrapped(torch.full((1, 3), factor * (rank + 1))).sum().backward()
        wrapped.finish_gradient_synchronization()
    expected = torch.full((1, 3), 16.5)
    assert_nearly_equal(wrapped.module.weight.grad, expected, what="the gradient of two backward passes")


def ranks_may_use_different_parameters(ddp, make: ArgumentMaker) -> None:
    run_on_ranks(_different, ddp, make.seed)


def _different(rank: int, ddp: Callable[..., Any], seed: int) -> None:
    """Rank 0 uses the first two layers, rank 1 the first and the third, nobody the fourth."""
    import torch

    class Chooses(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [torch.nn.Linear(2, 2, bias=False) for _ in range(4)]
            for layer in layers:
                torch.nn.init.ones_(layer.weight)
            self.layers = torch.nn.ModuleList(layers)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1 + rank](self.layers[0](x))

    model: Any = Chooses()
    wrapped = ddp(model)
    for _ in range(2):
        model.zero_grad()
        wrapped(torch.ones(1, 2)).sum().backward()
        wrapped.finish_gradient_synchronization()
        gradients = [layer.weight.grad for layer in model.layers]
        assert gradients[3] is None, "a parameter that no rank used has a gradient"
        for gradient, expected in zip(gradients, (2.0, 1.0, 1.0), strict=False):
            assert_nearly_equal(
                gradient, torch.full((2, 2), expected), what="the gradient of a layer used by some ranks"
            )


contract = Component(
    signature=ddp,
    kind="module",
    summary="data-parallel training with gradients averaged during backward",
    formula="∇ = (1 / world_size) · Σ over ranks of ∇",
    paper="https://arxiv.org/abs/2006.15704",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    dtypes=("float32", "float64"),
    mutates=("module",),
    features=("unused_parameters",),
    tolerance=Tolerance(
        factor=4.0, floor=16.0, reason="the batch is summed in two parts, and steps carry the rounding on"
    ),
    cases=(
        Case(id="plain"),
        Case(id="tied", sizes={"kind": "tied"}),
        Case(id="frozen", sizes={"kind": "frozen"}),
        Case(id="unused", sizes={"kind": "unused"}, features=("unused_parameters",)),
    ),
    error_cases=(
        ErrorCase(
            id="not_a_module",
            arguments=lambda make: {"module": make.normal(3)},
            error=TypeError,
            match="module is a Tensor: pass a torch.nn.Module",
        ),
        ErrorCase(
            id="no_process_group",
            arguments=lambda make: {"module": example(make, "plain")},
            error=RuntimeError,
            match="there is no process group: start the ranks with torchrun",
        ),
    ),
    laws=(
        Law(id="average", statement="gradients are averaged, not summed", check=gradients_are_averaged),
        Law(id="accumulate", statement="gradients of several backward passes add up", check=gradients_accumulate),
        Law(
            id="different_parameters",
            statement="ranks may use different parameters",
            check=ranks_may_use_different_parameters,
            features=("unused_parameters",),
        ),
    ),
    workloads=(Workload(id="three_steps", sizes={"batch": 64}),),
    adapter="get_ddp",
)
