"""Clipping of all gradients together by their global norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def gradient_clipping(
    parameters: Iterable[Tensor] | Tensor, max_l2_norm: float, *, eps: float = 1e-6
) -> Float[Tensor, ""]:
    """Scale all gradients in place by `max_l2_norm / (norm + eps)` where their joint L2 norm exceeds `max_l2_norm`.

    parameters: tensors whose `.grad` is changed; those without a gradient are passed over, one that is listed twice
    counts once. Returns the norm before clipping, `sqrt(sum over all entries of gradient²)`, as a 0-d float32 tensor
    (float64 where a gradient is float64) on the gradients' device: nothing waits for the device. Gradients keep their
    dtype. A norm that is NaN or infinite is returned, so that the caller can see it; the gradients are then of no use.
    Raises ValueError where `max_l2_norm` or `eps` is negative or NaN.
    Source: Pascanu et al. 2013, "On the difficulty of training recurrent neural networks",
    https://arxiv.org/abs/1211.5063.
    """
    raise NotImplementedError


def check(max_l2_norm: float, eps: float) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    if not max_l2_norm >= 0:
        raise ValueError(f"gradient_clipping: max_l2_norm is {max_l2_norm}: it must not be negative (1.0 is usual)")
    if not eps >= 0:
        raise ValueError(f"gradient_clipping: eps is {eps}: it must not be negative (1e-6 is usual)")


def gradients_of(parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Every gradient once, in order: what all backends mean by "all gradients"."""
    import torch

    listed = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    return [parameter.grad for parameter in dict.fromkeys(listed) if parameter.grad is not None]


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    shapes = sizes["shapes"]
    return {
        "parameters": [make.normal(*shape) for shape in shapes],
        # None: a parameter that takes no part, as a frozen or unused one does.
        "gradients": [
            None if index in sizes.get("without_gradient", ()) else make.normal(*shape, scale=sizes.get("scale", 1.0))
            for index, shape in enumerate(shapes)
        ],
        "max_l2_norm": sizes.get("max_l2_norm", 1e-2),
        "eps": sizes.get("eps", 1e-6),
    }


def observe(implementation: Callable[..., Tensor], arguments: Arguments) -> Any:
    """The returned norm and every gradient afterwards; the arguments themselves are left alone."""
    wanted = dict(arguments)
    parameters = with_gradients(wanted.pop("parameters"), wanted.pop("gradients"))
    norm = implementation(parameters, **wanted)
    return norm, [parameter.grad for parameter in parameters if parameter.grad is not None]


def timed(implementation: Callable[..., Tensor], arguments: Arguments) -> Callable[[], Any]:
    """Clipping in place, over and over: the norm is taken and the gradients are scaled by a factor near 1."""
    wanted = dict(arguments)
    parameters = with_gradients(wanted.pop("parameters"), wanted.pop("gradients"))
    return lambda: implementation(parameters, **wanted)


def with_gradients(values: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Any]:
    """Fresh leaf parameters that hold `values` and `gradients`."""
    parameters = [value.detach().clone().requires_grad_() for value in values]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.detach().clone()
    return parameters


def oracle(parameters: list[Tensor], max_l2_norm: float, eps: float = 1e-6) -> Tensor:
    import torch

    gradients = gradients_of(parameters)
    wide = torch.float32
    for gradient in gradients:
        wide = torch.promote_types(wide, gradient.dtype)
    if not gradients:
        return torch.zeros((), dtype=wide)
    norm = torch.cat([gradient.to(wide).reshape(-1) for gradient in gradients]).norm()
    if norm > max_l2_norm:
        for gradient in gradients:
            gradient.copy_(gradient.to(wide) * (max_l2_norm / (norm + eps)))
    return norm


def _example(make: ArgumentMaker, scale: float) -> list[Any]:
    values = [make.normal(*shape) for shape in ((7, 5), (11,), (3, 2, 2))]
    return with_gradients(values, [make.normal(*value.shape, scale=scale) for value in values])


def clipping_twice_is_clipping_once(gradient_clipping, make: ArgumentMaker) -> None:
    parameters = _example(make, 3.0)
    gradient_clipping(parameters, 0.5)
    once = [parameter.grad.clone() for parameter in parameters]
    gradient_clipping(parameters, 0.5)
    for parameter, gradient in zip(parameters, once, strict=True):
        assert_nearly_equal(parameter.grad / 0.5, gradient / 0.5, what="the gradient clipped twice")


def the_direction_stays(gradient_clipping, make: ArgumentMaker) -> None:
    import torch

    parameters = _example(make, 3.0)
    before = torch.cat([parameter.grad.double().reshape(-1) for parameter in parameters])
    norm = gradient_clipping(parameters, 1.0)
    after = torch.cat([parameter.grad.double().reshape(-1) for parameter in parameters])
    assert_nearly_equal(norm.to(make.dtype), before.norm().to(make.dtype), what="the returned norm")
    assert_nearly_equal(after.norm().to(make.dtype), torch.ones_like(norm, dtype=make.dtype), what="the clipped norm")
    assert_nearly_equal((after * before.norm()).to(make.dtype), before.to(make.dtype), what="the direction")


def small_gradients_stay(gradient_clipping, make: ArgumentMaker) -> None:
    parameters = _example(make, 1e-3)
    before = [parameter.grad.clone() for parameter in parameters]
    values = [parameter.detach().clone() for parameter in parameters]
    gradient_clipping(parameters, 1.0)
    for parameter, gradient, value in zip(parameters, before, values, strict=True):
        assert (parameter.grad == gradient).all(), "a gradient below the limit was changed"
        assert (parameter.detach() == value).all(), "a parameter's value was changed"


def a_shared_parameter_counts_once(gradient_clipping, make: ArgumentMaker) -> None:
    once = _example(make, 3.0)
    twice = with_gradients([p.detach() for p in once], [p.grad for p in once])
    norm = gradient_clipping((parameter for parameter in [*twice, twice[0]]), 1.0)
    assert_nearly_equal(norm, gradient_clipping(iter(once), 1.0), what="the norm with a parameter listed twice")
    for one, other in zip(once, twice, strict=True):
        assert_nearly_equal(other.grad, one.grad, what="a gradient of a parameter listed twice")


def no_gradients_no_norm(gradient_clipping, make: ArgumentMaker) -> None:
    parameter = make.normal(3).detach().requires_grad_()
    assert float(gradient_clipping([parameter], 1.0)) == 0.0 and parameter.grad is None
    assert float(gradient_clipping([], 1.0)) == 0.0


contract = Component(
    signature=gradient_clipping,
    kind="op",
    summary="all gradients scaled together to a largest L2 norm",
    formula="g ← g · max_l2_norm / (‖g‖₂ + eps) where ‖g‖₂ > max_l2_norm",
    paper="https://arxiv.org/abs/1211.5063",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    timed=timed,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    mutates=("parameters",),
    tolerance=Tolerance(
        floor=4.0, reason="one rounding of the coefficient and one of the product, beside the norm's summation order"
    ),
    cases=(
        Case(id="course", sizes={"shapes": ((5, 5),) * 6, "without_gradient": (5,)}),
        Case(id="odd", sizes={"shapes": ((123, 7), (9,), (1,), (3, 2, 5)), "max_l2_norm": 1.0}),
        Case(id="below_the_limit", sizes={"shapes": ((8, 8), (8,)), "scale": 1e-3, "max_l2_norm": 1.0}),
        Case(id="zero_gradients", sizes={"shapes": ((8,), (4, 4)), "scale": 0.0, "max_l2_norm": 1.0}),
        Case(id="empty_tensor", sizes={"shapes": ((0, 3), (4,)), "max_l2_norm": 0.1}),
        Case(id="large_eps", sizes={"shapes": ((6, 6),), "eps": 0.5, "max_l2_norm": 1.0}),
        Case(id="limit_zero", sizes={"shapes": ((6, 6), (2,)), "max_l2_norm": 0.0}),
        Case(id="many_tensors", sizes={"shapes": ((3, 5),) * 130, "max_l2_norm": 1.0}),
    ),
    error_cases=(
        ErrorCase(
            id="negative_norm",
            arguments=lambda make: {"parameters": [make.normal(3)], "max_l2_norm": -1.0},
            match="max_l2_norm is -1.0: it must not be negative",
        ),
        ErrorCase(
            id="norm_is_nan",
            arguments=lambda make: {"parameters": [make.normal(3)], "max_l2_norm": float("nan")},
            match="max_l2_norm is nan",
        ),
        ErrorCase(
            id="negative_eps",
            arguments=lambda make: {"parameters": [make.normal(3)], "max_l2_norm": 1.0, "eps": -1e-6},
            match="eps is -1e-06",
        ),
    ),
    laws=(
        Law(id="idempotent", statement="clipping twice is clipping once", check=clipping_twice_is_clipping_once),
        Law(id="direction", statement="clipping keeps the direction and reaches the limit", check=the_direction_stays),
        Law(id="untouched", statement="gradients below the limit are untouched", check=small_gradients_stay),
        Law(id="shared", statement="a parameter listed twice counts once", check=a_shared_parameter_counts_once),
        Law(id="nothing", statement="without gradients the norm is 0", check=no_gradients_no_norm),
    ),
    workloads=tuple(
        Workload(
            id=f"{tensors}x{rows}x{columns}",
            sizes={"shapes": ((rows, columns),) * tensors, "max_l2_norm": 1.0},
            bytes_moved=lambda itemsize, n=tensors * rows * columns: 3 * n * itemsize,
            flops=3.0 * tensors * rows * columns,
        )
        for tensors, rows, columns in ((64, 128, 128), (36, 512, 512), (100, 2048, 2048))
    ),
    adapter="run_gradient_clipping",
)
