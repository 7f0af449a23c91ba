"""The softmax along one dimension."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import ArgumentMaker
from ..checks import require_floating
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def softmax(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Turn scores into probabilities along one dimension: `exp(x - max(x)) / sum(exp(x - max(x)))`.

    x: scores of any shape; -inf is a score that gets probability 0. dim: the dimension whose entries sum to 1. The
    maximum is subtracted so that no finite score overflows. Computed in float32 (float64 stays float64); the result has
    the dtype of `x`.
    Raises IndexError where `x` has no dimension `dim`, ValueError where it is empty, TypeError where `x` is not
    floating point.
    Source: Bridle 1990, "Probabilistic Interpretation of Feedforward Classification Network Outputs",
    https://doi.org/10.1007/978-3-642-76153-9_28.
    """
    raise NotImplementedError


def check(x: Tensor, dim: int) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    require_floating("softmax", x=x)
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(
            f"softmax: dim is {dim} but x has shape {tuple(x.shape)}: choose one of its {x.ndim} dimensions"
        )
    if x.shape[dim] == 0:
        raise ValueError(f"softmax: x has shape {tuple(x.shape)}: dimension {dim} must have at least one entry")


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    x = make.normal(*sizes["shape"], scale=sizes.get("scale", 1.0), mean=sizes.get("mean", 0.0))
    if "masked" in sizes:
        x = x.masked_fill(make.boolean(*sizes["shape"], probability=sizes["masked"]), float("-inf"))
        x[..., 0] = 1.0
    return {"x": x, "dim": sizes.get("dim", -1)}


def oracle(x: Tensor, dim: int) -> Tensor:
    import torch

    return torch.nn.functional.softmax(x, dim=dim, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def a_shift_changes_nothing(softmax, make: ArgumentMaker) -> None:
    # Multiples of 1/8 stay exact in float16 after the shift, so that only the softmax itself can differ.
    x = make.tensor(make.generator.integers(-16, 16, (5, 37)) / 8)
    assert_nearly_equal(softmax(x + 64), softmax(x))


def rows_sum_to_one(softmax, make: ArgumentMaker) -> None:
    x = make.normal(6, 101, scale=3.0)
    probabilities = softmax(x)
    assert (probabilities >= 0).all(), "a probability is negative"
    total = probabilities.double().sum(-1)
    assert_nearly_equal(total.to(x.dtype), total.to(x.dtype) * 0 + 1, what="the sum of a row")


def dim_is_honoured(softmax, make: ArgumentMaker) -> None:
    x = make.normal(4, 5, 6)
    assert_nearly_equal(softmax(x, 1), softmax(x.movedim(1, -1)).movedim(-1, 1))
    assert_nearly_equal(softmax(x, -3), softmax(x, 0))


contract = Component(
    signature=softmax,
    kind="op",
    summary="probabilities from scores along one dimension",
    formula="exp(x - max x) / Σ exp(x - max x)",
    paper="https://doi.org/10.1007/978-3-642-76153-9_28",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("x",),
    gradient_tolerance=Tolerance(
        factor=3.0,
        floor=8.0,
        absolute=2.0,
        stored=0.5,
        reason="p (g - p·g) is a difference of numbers near 1 where one p is near 1, and p may be the result, rounded: "
        "an error of up to 3 roundings of p g, which is near 1 in one of 41 columns or more, thus 3 / sqrt(41)",
    ),
    cases=(
        Case(id="course", sizes={"shape": (4, 12, 64)}),
        Case(id="odd", sizes={"shape": (5, 123, 123)}),
        Case(id="one_column", sizes={"shape": (7, 1)}),
        Case(id="one_row", sizes={"shape": (1000,)}),
        Case(id="no_rows", sizes={"shape": (0, 5)}),
        Case(id="first_dimension", sizes={"shape": (63, 9), "dim": 0}),
        Case(id="middle_dimension", sizes={"shape": (3, 41, 7), "dim": 1}),
        Case(id="plus_ten_thousand", sizes={"shape": (9, 41), "mean": 1e4}),
        Case(id="large_values", sizes={"shape": (9, 41), "scale": 100.0}),
        Case(id="minus_infinity", sizes={"shape": (9, 41), "masked": 0.5}),
        Case(id="wide", sizes={"shape": (2, 5003)}),
    ),
    error_cases=(
        ErrorCase(
            id="dim_too_large",
            arguments=lambda make: {"x": make.normal(2, 3), "dim": 2},
            error=IndexError,
            match=r"dim is 2 but x has shape \(2, 3\)",
        ),
        ErrorCase(
            id="empty_dimension",
            arguments=lambda make: {"x": make.normal(2, 0)},
            match=r"x has shape \(2, 0\): dimension -1 must have at least one entry",
        ),
        ErrorCase(
            id="integers",
            arguments=lambda make: {"x": make.integers(2, 3, high=9)},
            error=TypeError,
            match="softmax: x has dtype torch.int64",
        ),
    ),
    laws=(
        Law(id="shift", statement="a constant added to every score changes nothing", check=a_shift_changes_nothing),
        Law(id="sum", statement="probabilities are not negative and sum to 1", check=rows_sum_to_one),
        Law(id="dim", statement="any dimension may be the one that sums to 1", check=dim_is_honoured),
    ),
    workloads=tuple(
        Workload(
            id=f"{rows}x{columns}",
            sizes={"shape": (rows, columns)},
            bytes_moved=lambda itemsize, n=rows * columns: 2 * n * itemsize,
            backward_bytes_moved=lambda itemsize, n=rows * columns: 3 * n * itemsize,
            flops=5.0 * rows * columns,
            backward_flops=4.0 * rows * columns,
            device="any" if rows * columns <= 2**23 else "cuda",
        )
        for rows, columns in (
            (256, 10000),
            (8192, 1024),
            (8192, 8192),
            (8192, 32768),
            (4096, 131072),
        )
    ),
    adapter="run_softmax",
)
