"""Optimizer states cut over the ranks (ZeRO, stage 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload
from ..ranks import run_on_ranks
from . import adamw
from .ddp import WORLD_SIZE, check_process_group

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def sharded_optimizer(
    params: Iterable[Tensor] | Iterable[dict[str, Any]], optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
) -> Any:
    """An optimizer (a `torch.optim.Optimizer` class) that steps each parameter on one rank and sends it to the others.

    params: parameters or parameter groups, the same on every rank. optimizer_cls, kwargs: the optimizer that takes the
    steps and its arguments. The result is that of `optimizer_cls(params, **kwargs)`, given the same gradients on every
    rank; each rank holds the states of its own parameters alone, of about equal size. `step(closure)`, `zero_grad()`
    and `add_param_group()` work as always, and a change of `param_groups` (a learning rate, say) holds from the next
    step. `state_dict()` holds this rank's states under the indices of all parameters; `load_state_dict()` takes such a
    dict, or a whole one, and picks what is this rank's.
    Raises TypeError where optimizer_cls is no optimizer class, RuntimeError without a process group.
    Source: Rajbhandari et al. 2020, "ZeRO", https://arxiv.org/abs/1910.02054.
    """
    raise NotImplementedError


def check(optimizer_cls: Any) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    import torch

    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        found = optimizer_cls.__name__ if isinstance(optimizer_cls, type) else f"a {type(optimizer_cls).__name__}"
        raise TypeError(
            f"sharded_optimizer: optimizer_cls is {found}: pass a class such as torch.optim.AdamW (the class, not an "
            f"optimizer)"
        )
    check_process_group("sharded_optimizer")


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    import torch

    return {
        **adamw.arguments(case, make),
        "optimizer_cls": getattr(torch.optim, case.sizes.get("optimizer", "AdamW")),
        **case.sizes.get("settings", {"lr": 0.1, "weight_decay": 0.1}),
        "added_later": case.sizes.get("added_later", False),
    }


def observe(implementation: Callable[..., Any], arguments: Arguments) -> Any:
    """All parameters on every rank after all steps."""
    if implementation is oracle:
        return [_steps(0, oracle, arguments)] * WORLD_SIZE
    return run_on_ranks(_steps, implementation, arguments)


def _steps(rank: int, implementation: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    wanted = dict(arguments)
    gradients, groups, added_later = wanted.pop("gradients"), wanted.pop("groups"), wanted.pop("added_later")
    values = wanted.pop("params")
    parameters = adamw.with_gradients(values, [None] * len(values))
    listed = [{"params": [parameters[index] for index in members], **changes} for members, changes in groups]
    optimizer = implementation(listed[:1] if added_later else listed, **wanted)
    for group in listed[1:] if added_later else ():
        optimizer.add_param_group(group)
    half = len(gradients) // 2
    adamw.take_steps(optimizer, parameters, gradients[:half])
    for group in optimizer.param_groups:
        group["lr"] *= 0.5  # As a learning-rate schedule does it.
    adamw.take_steps(optimizer, parameters, gradients[half:])
    return [parameter.detach() for parameter in parameters]


def oracle(params: Any, optimizer_cls: Any, **kwargs: Any) -> Any:
    return optimizer_cls(params, **kwargs)


SHAPES = ((7, 5), (11,), (3, 2, 2), (40,), (6, 6))


def states_are_cut(sharded_optimizer, make: ArgumentMaker) -> None:
    found = run_on_ranks(_states, sharded_optimizer, make.seed)
    owners = [{index for index, _ in states} for states in found]
    assert owners[0] | owners[1] == set(range(len(SHAPES))), f"some parameters have no state: {owners}"
    assert not owners[0] & owners[1], f"some states are kept twice: {owners}"
    sizes = [sum(size for _, size in states) for states in found]
    assert max(sizes) <= 0.6 * sum(sizes), f"the ranks keep {sizes} entries: not about equal parts"


def _states(rank: int, sharded_optimizer: Callable[..., Any], seed: int) -> list[tuple[int, int]]:
    import torch

    make = ArgumentMaker(seed)
    shapes = SHAPES
    parameters = adamw.with_gradients([make.normal(*s) for s in shapes], [make.normal(*s) for s in shapes])
    optimizer = sharded_optimizer(parameters, torch.optim.AdamW, lr=0.1)
    optimizer.step()
    return [(index, state["exp_avg"].numel()) for index, state in optimizer.state_dict()["state"].items()]


def a_loaded_state_goes_on_the_same_way(sharded_optimizer, make: ArgumentMaker) -> None:
    run_on_ranks(_resume, sharded_optimizer, make.seed)


def _resume(rank: int, sharded_optimizer: Callable[..., Any], seed: int) -> None:
    """From a sharded state dict, and from that of a plain optimizer."""
    import copy

    import torch

    make = ArgumentMaker(seed)
    values = [make.normal(4, 3), make.normal(5), make.normal(2)]
    gradients = [[make.normal(4, 3), make.normal(5), make.normal(2)] for _ in range(4)]
    straight = adamw.with_gradients(values, [None] * 3)
    adamw.take_steps(torch.optim.AdamW(straight, lr=0.05), straight, gradients)
    for start in (lambda p: sharded_optimizer(p, torch.optim.AdamW, lr=0.05), lambda p: torch.optim.AdamW(p, lr=0.05)):
        first = adamw.with_gradients(values, [None] * 3)
        optimizer = start(first)
        adamw.take_steps(optimizer, first, gradients[:2])
        second = adamw.with_gradients(first, [None] * 3)
        resumed = sharded_optimizer(second, torch.optim.AdamW, lr=1.0)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        adamw.take_steps(resumed, second, gradients[2:])
        for one, other in zip(second, straight, strict=True):
            assert torch.equal(one, other), "resuming from a state dict leads elsewhere"


def _no_group(make: ArgumentMaker) -> Arguments:
    import torch

    return {"params": [make.normal(3)], "optimizer_cls": torch.optim.AdamW}


contract = Component(
    signature=sharded_optimizer,
    kind="optimizer",
    summary="any optimizer with its states cut over the ranks",
    formula="parameters ← gather over ranks r of step(parameters_r)",
    paper="https://arxiv.org/abs/1910.02054",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    dtypes=("float32", "float64"),
    mutates=("params",),
    features=("state_of_own_parameters",),
    tolerance=Tolerance(floor=4.0, reason="the same elementwise steps, in whichever of PyTorch's loops"),
    cases=(
        Case(id="adamw", sizes={"shapes": SHAPES}),
        Case(id="sgd_momentum", sizes={"shapes": SHAPES, "optimizer": "SGD", "settings": {"lr": 0.1, "momentum": 0.9}}),
        Case(
            id="groups",
            sizes={"shapes": SHAPES, "groups": (((0, 2, 4), {}), ((1, 3), {"weight_decay": 0.0, "lr": 0.01}))},
        ),
        Case(
            id="group_added_later",
            sizes={"shapes": SHAPES, "groups": (((0, 2), {}), ((1, 3, 4), {"weight_decay": 0.0})), "added_later": True},
        ),
        Case(id="fewer_parameters_than_ranks", sizes={"shapes": ((5, 5),)}),
        Case(
            id="missing_gradients",
            sizes={"shapes": SHAPES, "steps": 4, "without_gradient": ((0, 0), (2, 0), *((s, 1) for s in range(4)))},
        ),
    ),
    error_cases=(
        ErrorCase(
            id="not_a_class",
            arguments=lambda make: {"params": [make.normal(3)], "optimizer_cls": make.normal(3)},
            error=TypeError,
            match="optimizer_cls is a Tensor: pass a class such as torch.optim.AdamW",
        ),
        ErrorCase(
            id="no_process_group",
            arguments=_no_group,
            error=RuntimeError,
            match="sharded_optimizer: there is no process group",
        ),
    ),
    laws=(
        Law(
            id="cut",
            statement="each parameter's state is kept by one rank",
            check=states_are_cut,
            features=("state_of_own_parameters",),
        ),
        Law(
            id="resume",
            statement="a state dict resumes the identical trajectory",
            check=a_loaded_state_goes_on_the_same_way,
            features=("state_of_own_parameters",),
        ),
    ),
    workloads=(Workload(id="small", sizes={"shapes": ((256, 256),) * 8, "steps": 2}),),
    adapter="get_sharded_optimizer",
)
