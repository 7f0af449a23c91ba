"""Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload
from .gradient_clipping import with_gradients

if TYPE_CHECKING:
    from torch import Tensor


def adamw(
    params: Iterable[Tensor] | Iterable[dict[str, Any]],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Any:
    """An optimizer (a `torch.optim.Optimizer` class) that takes at step t, for every parameter p with gradient g:

    `p -= lr * weight_decay * p`, `m = beta1 * m + (1 - beta1) * g`, `v = beta2 * v + (1 - beta2) * g²`,
    `p -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)`.

    params: parameters, or parameter groups that may override the other arguments. The state of each parameter is
    "step", "exp_avg" (m) and "exp_avg_sq" (v), so state dicts move between backends. Moments and arithmetic are float32
    (float64 for float64 parameters) whatever the parameter's dtype. A parameter without a gradient is passed over.
    Raises ValueError for a negative lr, eps or weight_decay, or betas outside [0, 1).
    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101.
    """
    raise NotImplementedError


def check(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    for name, value, usual in (("lr", lr, "1e-3"), ("eps", eps, "1e-8"), ("weight_decay", weight_decay, "0.01")):
        if not value >= 0:
            raise ValueError(f"adamw: {name} is {value}: it must not be negative ({usual} is usual)")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw: betas are {betas}: they must be two numbers in [0, 1) ((0.9, 0.999) is usual)")


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    """`gradients` holds one list per step, None where a parameter has no gradient; `groups` says which parameters get
    which overrides.
    """
    sizes = case.sizes
    shapes, absent = sizes["shapes"], sizes.get("without_gradient", ())
    return {
        "params": [make.normal(*shape) for shape in shapes],
        "gradients": [
            [None if (step, index) in absent else make.normal(*shape, scale=sizes.get("scale", 1.0))
             for index, shape in enumerate(shapes)]
            for step in range(sizes.get("steps", 10))
        ],
        "groups": sizes.get("groups", ((range(len(shapes)), {}),)),
        **{name: sizes[name] for name in ("lr", "betas", "eps", "weight_decay") if name in sizes},
    }  # fmt: skip


def observe(implementation: Callable[..., Any], arguments: Arguments) -> Any:
    """Every parameter and its state after all steps."""
    wanted = dict(arguments)
    gradients, groups = wanted.pop("gradients"), wanted.pop("groups")
    values = wanted.pop("params")
    parameters = with_gradients(values, [None] * len(values))
    optimizer = implementation(
        [{"params": [parameters[index] for index in members], **overrides} for members, overrides in groups], **wanted
    )
    take_steps(optimizer, parameters, gradients)
    return {"parameters": parameters, "state": [state_of(optimizer, parameter) for parameter in parameters]}


def timed(implementation: Callable[..., Any], arguments: Arguments) -> Callable[[], Any]:
    """One step of an optimizer that has its parameters, gradients and state already."""
    wanted = dict(arguments)
    gradients, _ = wanted.pop("gradients"), wanted.pop("groups")
    parameters = with_gradients(wanted.pop("params"), gradients[0])
    return implementation(parameters, **wanted).step


def take_steps(optimizer: Any, parameters: Sequence[Tensor], gradients: Sequence[Sequence[Tensor | None]]) -> None:
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = None if gradient is None else gradient.detach().clone()
        optimizer.step()


def state_of(optimizer: Any, parameter: Tensor) -> dict[str, Any]:
    state = optimizer.state.get(parameter)
    if not state:
        return {}
    return {"step": float(state["step"]), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def oracle(params: list[dict[str, Any]], **hyperparameters: Any) -> Any:
    """torch.optim.AdamW over copies in float32 (or float64), rounded to the parameters' dtype after every step."""
    import torch

    class WideAdamW:
        def __init__(self) -> None:
            self.wide = {
                parameter: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).requires_grad_()
                for group in params
                for parameter in group["params"]
            }
            groups = [group | {"params": [self.wide[parameter] for parameter in group["params"]]} for group in params]
            self.optimizer = torch.optim.AdamW(groups, foreach=False, **hyperparameters)

        def step(self) -> None:
            for parameter, wide in self.wide.items():
                wide.data.copy_(parameter.detach())
                wide.grad = None if parameter.grad is None else parameter.grad.to(wide.dtype)
            self.optimizer.step()
            for parameter, wide in self.wide.items():
                parameter.data.copy_(wide.detach())

        @property
        def state(self) -> dict[Any, Any]:
            return {parameter: self.optimizer.state.get(wide) for parameter, wide in self.wide.items()}

    return WideAdamW()


def the_first_step_has_length_lr(adamw, make: ArgumentMaker) -> None:
    value, gradient = make.normal(5, 7), make.normal(5, 7)
    (parameter,) = with_gradients([value], [gradient])
    adamw([parameter], lr=0.125, eps=0.0, weight_decay=0.0).step()
    assert_nearly_equal(parameter, value - 0.125 * gradient.sign())


def without_gradient_signal_only_decay_is_left(adamw, make: ArgumentMaker) -> None:
    (parameter,) = with_gradients([make.tensor([2.0, -4.0, 8.0])], [make.tensor([0.0, 0.0, 0.0])])
    optimizer = adamw([parameter], lr=0.5, weight_decay=0.5)
    optimizer.step()
    optimizer.step()
    assert_nearly_equal(parameter, make.tensor([2.0, -4.0, 8.0]) * 0.75**2)


def scaling_the_gradients_changes_nothing(adamw, make: ArgumentMaker) -> None:
    value, gradients = make.normal(6), [make.normal(6) for _ in range(5)]
    once, scaled = with_gradients([value, value], [None, None])
    take_steps(adamw([once], lr=0.1, eps=0.0), [once], [[gradient] for gradient in gradients])
    take_steps(adamw([scaled], lr=0.1, eps=0.0), [scaled], [[gradient * 16] for gradient in gradients])
    assert_nearly_equal(scaled, once)


def no_gradient_no_change(adamw, make: ArgumentMaker) -> None:
    value = make.normal(3)
    moved, kept = with_gradients([value, value], [make.normal(3), None])
    optimizer = adamw([moved, kept], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert (kept.detach() == value).all(), "a parameter without a gradient was changed"
    assert not state_of(optimizer, kept), "a parameter without a gradient has a state"
    assert not (moved.detach() == value).all(), "a parameter with a gradient was not changed"


def a_loaded_state_goes_on_the_same_way(adamw, make: ArgumentMaker) -> None:
    import copy

    values = [make.normal(4, 3), make.normal(5)]
    gradients = [[make.normal(4, 3), make.normal(5)] for _ in range(6)]
    straight = with_gradients(values, [None, None])
    take_steps(adamw(straight, lr=0.05), straight, gradients)
    first = with_gradients(values, [None, None])
    optimizer = adamw(first, lr=0.05)
    take_steps(optimizer, first, gradients[:3])
    second = with_gradients(first, [None, None])
    resumed = adamw(second, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take_steps(resumed, second, gradients[3:])
    for one, other in zip(second, straight, strict=True):
        assert (one.detach() == other.detach()).all(), "resuming from a state dict leads elsewhere"


def closures_are_called(adamw, make: ArgumentMaker) -> None:
    (parameter,) = with_gradients([make.normal(3)], [None])
    optimizer = adamw([parameter])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    before = float((parameter.detach() ** 2).sum())
    returned = float(optimizer.step(closure).detach())
    assert abs(returned - before) <= 1e-2 * before, f"step(closure) returned {returned}, the closure's loss is {before}"


contract = Component(
    signature=adamw,
    kind="optimizer",
    summary="Adam with decoupled weight decay",
    formula="p ← p − lr·λ·p;  p ← p − lr · m̂ / (√v̂ + eps)",
    paper="https://arxiv.org/abs/1711.05101",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    timed=timed,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    mutates=("params",),
    tolerance=Tolerance(
        factor=2.0,
        floor=8.0,
        absolute=2.0,
        reason="each of ten steps rounds the parameter, 1 - lr · weight_decay may be rounded too; the moments of a "
        "single number may cancel, gradients are near 1",
    ),
    cases=(
        Case(id="defaults", sizes={"shapes": ((7, 5), (11,)), "scale": 0.1}),
        Case(
            id="course",
            sizes={
                "shapes": ((2, 3),),
                "lr": 1e-3,
                "weight_decay": 0.01,
                "betas": (0.9, 0.999),
                "eps": 1e-8,
            },
        ),
        Case(
            id="large_steps",
            sizes={"shapes": ((9, 3), (2, 2, 2)), "lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95)},
        ),
        Case(id="no_decay", sizes={"shapes": ((33,),), "weight_decay": 0.0}),
        Case(id="no_momentum", sizes={"shapes": ((33,),), "betas": (0.0, 0.0), "lr": 1e-2}),
        Case(id="large_eps", sizes={"shapes": ((33,),), "eps": 1.0, "lr": 1e-2}),
        Case(
            id="groups",
            sizes={"shapes": ((8, 4), (8,), (3,)), "groups": (((0, 2), {}), ((1,), {"weight_decay": 0.0, "lr": 1e-2}))},
        ),
        Case(
            id="missing_gradients",
            sizes={
                "shapes": ((4,), (5,), (6,)),
                "steps": 4,
                "without_gradient": ((0, 0), (2, 0), *((s, 1) for s in range(4))),
            },
        ),
        Case(id="scalar_and_empty", sizes={"shapes": ((), (0, 3), (1,))}),
        Case(id="many_tensors", sizes={"shapes": ((3, 5),) * 70, "steps": 3}),
    ),
    error_cases=(
        ErrorCase(
            id="negative_lr",
            arguments=lambda make: {"params": [make.normal(3)], "lr": -1.0},
            match="lr is -1.0: it must not be negative",
        ),
        ErrorCase(
            id="negative_eps",
            arguments=lambda make: {"params": [make.normal(3)], "eps": -1e-8},
            match="eps is -1e-08",
        ),
        ErrorCase(
            id="negative_decay",
            arguments=lambda make: {"params": [make.normal(3)], "weight_decay": -0.1},
            match="weight_decay is -0.1",
        ),
        ErrorCase(
            id="beta_is_one",
            arguments=lambda make: {"params": [make.normal(3)], "betas": (0.9, 1.0)},
            match=r"betas are \(0.9, 1.0\)",
        ),
        ErrorCase(
            id="bad_group",
            arguments=lambda make: {"params": [{"params": [make.normal(3)], "lr": -2.0}]},
            match="lr is -2.0",
        ),
    ),
    laws=(
        Law(
            id="first_step",
            statement="without decay the first step is lr · sign(g)",
            check=the_first_step_has_length_lr,
        ),
        Law(
            id="decay",
            statement="zero gradients leave only the decay",
            check=without_gradient_signal_only_decay_is_left,
        ),
        Law(
            id="gradient_scale",
            statement="with eps = 0, scaling all gradients changes nothing",
            check=scaling_the_gradients_changes_nothing,
        ),
        Law(id="no_gradient", statement="a parameter without a gradient keeps still", check=no_gradient_no_change),
        Law(
            id="resume",
            statement="a state dict resumes the identical trajectory",
            check=a_loaded_state_goes_on_the_same_way,
        ),
        Law(id="closure", statement="step(closure) returns the closure's loss", check=closures_are_called),
    ),
    workloads=tuple(
        Workload(
            id=f"{tensors}x{rows}x{columns}",
            sizes={"shapes": ((rows, columns),) * tensors, "steps": 1},
            # Parameter and gradient in their dtype, two float32 moments; all but the gradient are written back.
            bytes_moved=lambda itemsize, n=tensors * rows * columns: n * (3 * itemsize + 16),
            flops=12.0 * tensors * rows * columns,
        )
        for tensors, rows, columns in ((64, 128, 128), (36, 512, 512), (100, 2048, 2048))
    ),
    adapter="get_adamw_cls",
)
