"""The linear transformation without a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import ArgumentMaker
from ..checks import require_floating, require_same_dtype
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def linear(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "... d_out"]:
    """Multiply each row by a matrix: `x @ weight.T`.

    x: any leading dimensions. weight: one row per output feature, as in `torch.nn.Linear`; there is no bias. Sums are
    accumulated in at least float32 and rounded once to the dtype of `x` (under autocast: the dtype autocast chooses).
    Raises ValueError where the shapes do not fit, TypeError where the dtypes differ outside autocast.
    Source: Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762 (bias-free as in PaLM and
    Llama).
    """
    raise NotImplementedError


def check(x: Tensor, weight: Tensor) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    import torch

    require_floating("linear", x=x, weight=weight)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: weight has shape {tuple(weight.shape)} but x has shape {tuple(x.shape)}: weight must be (d_out, "
            f"d_in) with "
            f"d_in the last dimension of x"
        )
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        require_same_dtype("linear", x=x, weight=weight)


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    return {
        "x": make.normal(*sizes.get("leading", ()), sizes["d_in"], scale=sizes.get("scale", 1.0)),
        "weight": make.normal(sizes["d_out"], sizes["d_in"], scale=(2 / (sizes["d_in"] + sizes["d_out"])) ** 0.5),
    }


def oracle(x: Tensor, weight: Tensor) -> Tensor:
    import torch

    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.einsum("...i,oi->...o", x.to(wide), weight.to(wide)).to(x.dtype)


def additive(linear, make: ArgumentMaker) -> None:
    one, other, weight = make.normal(5, 24), make.normal(5, 24), make.normal(9, 24, scale=0.2)
    assert_nearly_equal(linear(one + other, weight), linear(one, weight) + linear(other, weight))
    assert_nearly_equal(linear(4 * one, weight), 4 * linear(one, weight))


def identity_changes_nothing(linear, make: ArgumentMaker) -> None:
    import torch

    x = make.normal(3, 21)
    identity = torch.eye(21, dtype=x.dtype, device=x.device)
    assert (linear(x, identity) == x).all(), "the identity matrix changed x"
    shift = identity.roll(1, 0)
    assert (linear(x, shift) == x.roll(1, -1)).all(), (
        "weight is used transposed: row o of weight makes output feature o"
    )


contract = Component(
    signature=linear,
    kind="op",
    summary="linear transformation without a bias",
    formula="x · weightᵀ",
    paper="https://arxiv.org/abs/1706.03762",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("x", "weight"),
    tolerance=Tolerance(
        absolute=32.0,
        reason="2000 products added one after another lose sqrt(2000 / 6), about 18 roundings of a result near 1.7, as "
        "a random walk; PyTorch's order in blocks, which sets the measure, loses fewer",
    ),
    gradient_tolerance=Tolerance(
        factor=3.0,
        floor=4.0,
        absolute=8.0,
        reason="with one feature the gradient of weight is one sum of six products near 1, which may cancel: each of "
        "five additions rounds a partial sum of about 2, in whatever order",
    ),
    cases=(
        Case(id="course", sizes={"leading": (4, 12), "d_in": 64, "d_out": 128}),
        Case(id="odd", sizes={"leading": (9, 7), "d_in": 41, "d_out": 123}),
        Case(id="one_row", sizes={"d_in": 33, "d_out": 5}),
        Case(id="one_feature", sizes={"leading": (6,), "d_in": 1, "d_out": 1}),
        Case(id="no_rows", sizes={"leading": (0, 3), "d_in": 8, "d_out": 4}),
        Case(id="leading", sizes={"leading": (2, 3, 4), "d_in": 16, "d_out": 24}),
        Case(id="long_sum", sizes={"leading": (3,), "d_in": 2000, "d_out": 7}),
        Case(id="large_values", sizes={"leading": (5,), "d_in": 63, "d_out": 17, "scale": 100.0}),
    ),
    error_cases=(
        ErrorCase(
            id="transposed",
            arguments=lambda make: {"x": make.normal(2, 8), "weight": make.normal(8, 4)},
            match=r"weight has shape \(8, 4\) but x has shape \(2, 8\)",
        ),
        ErrorCase(
            id="weight_not_a_matrix",
            arguments=lambda make: {"x": make.normal(2, 8), "weight": make.normal(8)},
            match=r"weight has shape \(8,\) but x has shape \(2, 8\)",
        ),
        ErrorCase(
            id="dtypes_differ",
            arguments=lambda make: {"x": make.normal(2, 8).float(), "weight": make.normal(4, 8).half()},
            error=TypeError,
            match="linear: weight has dtype torch.float16 but x has torch.float32",
        ),
        ErrorCase(
            id="integers",
            arguments=lambda make: {"x": make.integers(2, 8, high=9), "weight": make.normal(4, 8)},
            error=TypeError,
            match="linear: x has dtype torch.int64",
        ),
    ),
    laws=(
        Law(id="linear", statement="sums and multiples pass through", check=additive),
        Law(id="orientation", statement="row o of weight makes output feature o", check=identity_changes_nothing),
    ),
    workloads=tuple(
        Workload(
            id=f"{rows}x{d_in}x{d_out}",
            sizes={"leading": (rows,), "d_in": d_in, "d_out": d_out},
            bytes_moved=lambda itemsize, n=rows * d_in + d_out * d_in + rows * d_out: n * itemsize,
            backward_bytes_moved=lambda itemsize, n=rows * d_in + d_out * d_in + rows * d_out: 2 * n * itemsize,
            flops=2.0 * rows * d_in * d_out,
            backward_flops=4.0 * rows * d_in * d_out,
            device="any" if d_in < 4096 else "cuda",
        )
        for rows, d_in, d_out in (
            (256, 512, 1344),
            (8192, 768, 2048),
            (8192, 4096, 4096),
            (8192, 8192, 8192),
        )
    ),
    adapter="run_linear",
)
