"""The sigmoid linear unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import ArgumentMaker
from ..checks import require_floating
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Weigh each number by its own sigmoid: `x * sigmoid(x)`.

    x: any shape. Computed in float32 (float64 stays float64); the result has the dtype of `x`.
    Raises TypeError where `x` is not floating point.
    Source: Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415; Elfwing et al. 2017,
    https://arxiv.org/abs/1702.03118.
    """
    raise NotImplementedError


def check(x: Tensor) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    require_floating("silu", x=x)


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    return {"x": make.normal(*case.sizes["shape"], scale=case.sizes.get("scale", 1.0))}


def oracle(x: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.silu(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def opposite_inputs_differ_by_the_input(silu, make: ArgumentMaker) -> None:
    x = make.normal(5, 33)
    assert_nearly_equal(silu(x) - silu(-x), x)


def far_from_zero_it_is_a_rectifier(silu, make: ArgumentMaker) -> None:
    far = make.tensor([-3e4, -1e3, 1e3, 3e4])
    assert_nearly_equal(silu(far), far.clamp(min=0.0))


contract = Component(
    signature=silu,
    kind="op",
    summary="sigmoid linear unit",
    formula="x · sigmoid(x)",
    paper="https://arxiv.org/abs/1702.03118",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("x",),
    tolerance=Tolerance(
        floor=5.0,
        reason="of a single number nothing averages out: an exponential (2 roundings), a sum, a quotient, a product",
    ),
    gradient_tolerance=Tolerance(
        factor=3.0,
        floor=7.0,
        absolute=4.0,
        reason="two roundings more than the result; 1 + x (1 - sigmoid x) vanishes at -1.28, where it is a difference "
        "of numbers near 1",
    ),
    cases=(
        Case(id="course", sizes={"shape": (4, 12, 64)}),
        Case(id="odd", sizes={"shape": (5, 123, 7)}),
        Case(id="one_number", sizes={"shape": (1,)}),
        Case(id="no_dimensions", sizes={"shape": ()}),
        Case(id="empty", sizes={"shape": (0, 8)}),
        Case(id="large_values", sizes={"shape": (7, 41), "scale": 100.0}),
        Case(id="tiny_values", sizes={"shape": (7, 41), "scale": 1e-3}),
        Case(id="many", sizes={"shape": (3, 1128)}),
    ),
    error_cases=(
        ErrorCase(
            id="integers",
            arguments=lambda make: {"x": make.integers(3, high=9)},
            error=TypeError,
            match="silu: x has dtype torch.int64",
        ),
        ErrorCase(id="not_a_tensor", arguments=lambda make: {"x": [1.0]}, error=TypeError, match="silu: x is a list"),
    ),
    laws=(
        Law(
            id="reflection",
            statement="silu(x) - silu(-x) = x, since sigmoid(x) + sigmoid(-x) = 1",
            check=opposite_inputs_differ_by_the_input,
        ),
        Law(id="asymptotes", statement="far from zero it equals max(x, 0)", check=far_from_zero_it_is_a_rectifier),
    ),
    workloads=tuple(
        Workload(
            id=f"{rows}x{features}",
            sizes={"shape": (rows, features)},
            bytes_moved=lambda itemsize, n=rows * features: 2 * n * itemsize,
            backward_bytes_moved=lambda itemsize, n=rows * features: 3 * n * itemsize,
            flops=5.0 * rows * features,
            backward_flops=9.0 * rows * features,
        )
        for rows, features in ((256, 1344), (8192, 2048), (8192, 14336))
    ),
    adapter="run_silu",
)
