"""Root mean square layer normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import ArgumentMaker
from ..checks import require_floating
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def rmsnorm(
    x: Float[Tensor, "... d_model"], weight: Float[Tensor, " d_model"], eps: float = 1e-5
) -> Float[Tensor, "... d_model"]:
    """Divide each row by its root mean square and scale it: `x / sqrt(mean(x², -1) + eps) * weight`.

    x: activations, any leading dimensions. weight: the gain, one number per feature. eps: added under the root.
    Statistics are taken in float32 (float64 stays float64); the result has the dtype of `x`.
    Raises ValueError where `weight` is not a vector as long as the last dimension of `x`, or `eps` is negative, and
    TypeError where `x` or `weight` is not floating point.
    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", https://arxiv.org/abs/1910.07467.
    """
    raise NotImplementedError


def check(x: Tensor, weight: Tensor, eps: float) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    require_floating("rmsnorm", x=x, weight=weight)
    if weight.ndim != 1 or x.ndim == 0 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"rmsnorm: weight has shape {tuple(weight.shape)} but x has shape {tuple(x.shape)}: weight must be a "
            f"vector as long as the last dimension of x"
        )
    if eps < 0:
        raise ValueError(f"rmsnorm: eps is {eps}: it must not be negative (1e-5 is usual)")


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    shape = (*sizes.get("leading", ()), sizes["d_model"])
    return {
        "x": make.normal(*shape, scale=sizes.get("scale", 1.0)),
        "weight": make.normal(sizes["d_model"], scale=0.1, mean=1.0),
        "eps": sizes.get("eps", 1e-5),
    }


def oracle(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    import torch

    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.rms_norm(x.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)


def scaling_the_input_changes_nothing(rmsnorm, make: ArgumentMaker) -> None:
    x, weight = make.normal(4, 64), make.normal(64)
    assert_nearly_equal(rmsnorm(x * 8, weight, 0.0), rmsnorm(x, weight, 0.0))


def rows_do_not_meet(rmsnorm, make: ArgumentMaker) -> None:
    x, weight = make.normal(6, 31), make.normal(31)
    changed = x.clone()
    changed[3] = 1.0
    before, after = rmsnorm(x, weight), rmsnorm(changed, weight)
    kept = [0, 1, 2, 4, 5]
    assert (before[kept] == after[kept]).all(), "changing row 3 changed another row"


contract = Component(
    signature=rmsnorm,
    kind="op",
    summary="root mean square normalisation with a gain",
    formula="x / sqrt(mean(x²) + eps) · weight",
    paper="https://arxiv.org/abs/1910.07467",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("x", "weight"),
    gradient_tolerance=Tolerance(
        factor=3.0,
        floor=4.0,
        absolute=256.0,
        reason="with one feature the gradient of x is a difference of equal numbers, each as large as 1 / |x|",
    ),
    cases=(
        Case(id="course", sizes={"leading": (4, 12), "d_model": 64}),
        Case(id="odd", sizes={"leading": (5, 123), "d_model": 123}),
        Case(id="one_feature", sizes={"leading": (3,), "d_model": 1}),
        Case(id="one_row", sizes={"d_model": 760}),
        Case(id="no_rows", sizes={"leading": (0, 4), "d_model": 8}),
        Case(id="tiny_values", sizes={"leading": (7,), "d_model": 41, "scale": 1e-4}),
        Case(id="large_eps", sizes={"leading": (2, 3), "d_model": 33, "eps": 0.5}),
    ),
    error_cases=(
        ErrorCase(
            id="weight_too_long",
            arguments=lambda make: {"x": make.normal(2, 8), "weight": make.normal(9)},
            match=r"weight has shape \(9,\) but x has shape \(2, 8\)",
        ),
        ErrorCase(
            id="negative_eps",
            arguments=lambda make: {"x": make.normal(2, 8), "weight": make.normal(8), "eps": -1.0},
            match="eps is -1.0",
        ),
        ErrorCase(
            id="integers",
            arguments=lambda make: {"x": make.integers(2, 8, high=9), "weight": make.normal(8)},
            error=TypeError,
            match="rmsnorm: x has dtype torch.int64",
        ),
    ),
    laws=(
        Law(
            id="scale",
            statement="with eps = 0, a power of two times x gives the same result",
            check=scaling_the_input_changes_nothing,
        ),
        Law(id="rows", statement="a row's result depends on that row alone", check=rows_do_not_meet),
    ),
    workloads=tuple(
        Workload(
            id=f"{rows}x{d_model}",
            sizes={"leading": (rows,), "d_model": d_model},
            bytes_moved=lambda itemsize, n=rows * d_model: 2 * n * itemsize,
            backward_bytes_moved=lambda itemsize, n=rows * d_model: 3 * n * itemsize,
            flops=4.0 * rows * d_model,
        )
        for rows, d_model in ((256, 512), (8192, 768), (16384, 4096), (4096, 16384))
    ),
    adapter="run_rmsnorm",
)
