"""A residual addition and the RMS normalisation that follows it, in one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import ArgumentMaker
from ..checks import require_floating, require_same_dtype
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def add_rmsnorm(
    x: Float[Tensor, "... d_model"],
    residual: Float[Tensor, "... d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, "... d_model"]]:
    """Add a sublayer's output to the residual stream and normalise the sum: `h = x + residual; (rmsnorm(h, weight,
    eps), h)`.

    x: the sublayer's output, residual: the stream, of equal shape and dtype. Returns the normalised sum and the sum,
    the stream's new value. The sum is rounded to the dtype of `x` before it is normalised, so that the result equals
    `rmsnorm` of the second result. Statistics are taken in float32 (float64 stays float64).
    Raises ValueError where shapes do not fit or `eps` is negative, TypeError where `x` and `residual` differ in dtype.
    Source: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467; pre-norm: Xiong et al. 2020,
    https://arxiv.org/abs/2002.04745.
    """
    raise NotImplementedError


def check(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    require_floating("add_rmsnorm", x=x, residual=residual, weight=weight)
    require_same_dtype("add_rmsnorm", x=x, residual=residual)
    if x.shape != residual.shape:
        raise ValueError(
            f"add_rmsnorm: x has shape {tuple(x.shape)} but residual has shape {tuple(residual.shape)}: they must be "
            f"equal"
        )
    if weight.ndim != 1 or x.ndim == 0 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"add_rmsnorm: weight has shape {tuple(weight.shape)} but x has shape {tuple(x.shape)}: weight must be a "
            f"vector "
            f"as long as the last dimension of x"
        )
    if eps < 0:
        raise ValueError(f"add_rmsnorm: eps is {eps}: it must not be negative (1e-5 is usual)")


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    shape = (*sizes.get("leading", ()), sizes["d_model"])
    return {
        "x": make.normal(*shape, scale=sizes.get("scale", 1.0)),
        "residual": make.normal(*shape, scale=sizes.get("residual_scale", sizes.get("scale", 1.0))),
        "weight": make.normal(sizes["d_model"], scale=0.1, mean=1.0),
        "eps": sizes.get("eps", 1e-5),
    }


def oracle(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    import torch

    total = x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = torch.nn.functional.rms_norm(total.to(wide), (x.shape[-1],), weight.to(wide), eps).to(x.dtype)
    return normed, total


def order_of_the_sum_does_not_matter(add_rmsnorm, make: ArgumentMaker) -> None:
    x, residual, weight = make.normal(4, 33), make.normal(4, 33), make.normal(33)
    for one, other in zip(add_rmsnorm(x, residual, weight), add_rmsnorm(residual, x, weight), strict=True):
        assert (one == other).all(), "swapping x and residual changed a result"


def the_second_result_is_the_sum(add_rmsnorm, make: ArgumentMaker) -> None:
    x, residual, weight = make.normal(4, 33), make.normal(4, 33), make.normal(33)
    normed, total = add_rmsnorm(x, residual, weight)
    assert (total == x + residual).all(), "the second result is not x + residual"
    again, _ = add_rmsnorm(total, 0 * total, weight)
    assert_nearly_equal(normed, again)


def both_gradients_reach_both_inputs(add_rmsnorm, make: ArgumentMaker) -> None:
    import torch

    x, residual = make.normal(3, 17).requires_grad_(), make.normal(3, 17).requires_grad_()
    weight, upstream = make.normal(17), make.normal(3, 17)
    _, total = add_rmsnorm(x, residual, weight)
    for gradient in torch.autograd.grad((total * upstream).sum(), (x, residual)):
        assert_nearly_equal(gradient, upstream, what="the gradient that passes through the sum")


contract = Component(
    signature=add_rmsnorm,
    kind="op",
    summary="residual addition followed by RMS normalisation",
    formula="h = x + residual; h / sqrt(mean(h²) + eps) · weight, h",
    paper="https://arxiv.org/abs/1910.07467",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("x", "residual", "weight"),
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
        Case(id="large_stream", sizes={"leading": (7,), "d_model": 41, "residual_scale": 300.0}),
        Case(id="large_eps", sizes={"leading": (2, 3), "d_model": 33, "eps": 0.5}),
    ),
    error_cases=(
        ErrorCase(
            id="shapes_differ",
            arguments=lambda make: {"x": make.normal(2, 8), "residual": make.normal(1, 8), "weight": make.normal(8)},
            match=r"x has shape \(2, 8\) but residual has shape \(1, 8\)",
        ),
        ErrorCase(
            id="weight_too_long",
            arguments=lambda make: {"x": make.normal(2, 8), "residual": make.normal(2, 8), "weight": make.normal(9)},
            match=r"weight has shape \(9,\) but x has shape \(2, 8\)",
        ),
        ErrorCase(
            id="dtypes_differ",
            arguments=lambda make: {
                "x": make.normal(2, 8).float(),
                "residual": make.normal(2, 8).half(),
                "weight": make.normal(8),
            },
            error=TypeError,
            match="residual has dtype torch.float16 but x has torch.float32",
        ),
        ErrorCase(
            id="negative_eps",
            arguments=lambda make: {
                "x": make.normal(2, 8),
                "residual": make.normal(2, 8),
                "weight": make.normal(8),
                "eps": -1.0,
            },
            match="eps is -1.0",
        ),
    ),
    laws=(
        Law(id="commutes", statement="x and residual may be swapped", check=order_of_the_sum_does_not_matter),
        Law(
            id="sum",
            statement="the second result is x + residual, and the first is the norm of the second",
            check=the_second_result_is_the_sum,
        ),
        Law(
            id="gradient_of_the_sum",
            statement="the gradient of the sum reaches x and residual unchanged",
            check=both_gradients_reach_both_inputs,
        ),
    ),
    workloads=tuple(
        Workload(
            id=f"{rows}x{d_model}",
            sizes={"leading": (rows,), "d_model": d_model},
            bytes_moved=lambda itemsize, n=rows * d_model: 4 * n * itemsize,
            # The gradients of both results and the sum are read, one gradient is written: both inputs share it.
            backward_bytes_moved=lambda itemsize, n=rows * d_model: 4 * n * itemsize,
            flops=5.0 * rows * d_model,
            backward_flops=9.0 * rows * d_model,
        )
        for rows, d_model in ((256, 512), (8192, 768), (16384, 4096), (4096, 16384))
    ),
)
