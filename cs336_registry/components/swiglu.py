"""The gated activation of the SwiGLU feed-forward network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..arguments import ArgumentMaker
from ..checks import require_floating, require_same_dtype
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def swiglu(gate: Float[Tensor, "... d_ff"], up: Float[Tensor, "... d_ff"]) -> Float[Tensor, "... d_ff"]:
    """Let a SiLU of one projection gate another, entry by entry: `gate * sigmoid(gate) * up`.

    gate: `x @ w1.T`, up: `x @ w3.T`, of equal shape and dtype. The whole feed-forward network, `w2(swiglu(w1 x, w3
    x))`, is `cs336_registry.nn.SwiGLU`. Computed in float32 (float64 stays float64); the result has the dtype of
    `gate`.
    Raises ValueError where the shapes differ, TypeError where the dtypes differ or are not floating point.
    Source: Shazeer 2020, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202.
    """
    raise NotImplementedError


def check(gate: Tensor, up: Tensor) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    require_floating("swiglu", gate=gate, up=up)
    require_same_dtype("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(
            f"swiglu: gate has shape {tuple(gate.shape)} but up has shape {tuple(up.shape)}: they must be equal "
            f"(expand one)"
        )


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    shape, scale = case.sizes["shape"], case.sizes.get("scale", 1.0)
    return {"gate": make.normal(*shape, scale=scale), "up": make.normal(*shape, scale=scale)}


def oracle(gate: Tensor, up: Tensor) -> Tensor:
    import torch

    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def linear_in_up(swiglu, make: ArgumentMaker) -> None:
    gate, up = make.normal(4, 31), make.normal(4, 31)
    assert_nearly_equal(swiglu(gate, 8 * up), 8 * swiglu(gate, up))
    assert_nearly_equal(swiglu(gate, up) + swiglu(gate, -up), 0 * up)


def closed_gate_lets_nothing_through(swiglu, make: ArgumentMaker) -> None:
    up = make.normal(4, 31)
    assert (swiglu(0 * up, up) == 0).all(), "a gate of zero must give zero"
    assert (swiglu(0 * up - 3e4, up) == 0).all(), "a gate far below zero must give zero"


contract = Component(
    signature=swiglu,
    kind="op",
    summary="SiLU-gated product of two projections",
    formula="gate · sigmoid(gate) · up",
    paper="https://arxiv.org/abs/2002.05202",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("gate", "up"),
    tolerance=Tolerance(
        floor=6.0,
        reason="of a single number nothing averages out: an exponential (2 roundings), a sum, a quotient, two products",
    ),
    gradient_tolerance=Tolerance(
        factor=3.0,
        floor=8.0,
        absolute=4.0,
        reason="two roundings more than the result; 1 + gate (1 - sigmoid gate) vanishes at a gate of -1.28, where it "
        "is a difference of numbers near 1",
    ),
    cases=(
        Case(id="course", sizes={"shape": (4, 12, 128)}),
        Case(id="odd", sizes={"shape": (9, 7, 41)}),
        Case(id="one_row", sizes={"shape": (760,)}),
        Case(id="one_number", sizes={"shape": (1, 1)}),
        Case(id="no_rows", sizes={"shape": (0, 8)}),
        Case(id="large_values", sizes={"shape": (5, 123), "scale": 50.0}),
        Case(id="tiny_values", sizes={"shape": (5, 123), "scale": 1e-2}),
    ),
    error_cases=(
        ErrorCase(
            id="shapes_differ",
            arguments=lambda make: {"gate": make.normal(2, 8), "up": make.normal(2, 9)},
            match=r"gate has shape \(2, 8\) but up has shape \(2, 9\)",
        ),
        ErrorCase(
            id="dtypes_differ",
            arguments=lambda make: {"gate": make.normal(2, 8).float(), "up": make.normal(2, 8).half()},
            error=TypeError,
            match="swiglu: up has dtype torch.float16 but gate has torch.float32",
        ),
        ErrorCase(
            id="integers",
            arguments=lambda make: {"gate": make.integers(3, high=9), "up": make.integers(3, high=9)},
            error=TypeError,
            match="swiglu: gate has dtype torch.int64",
        ),
    ),
    laws=(
        Law(id="linear_in_up", statement="it is linear in `up`", check=linear_in_up),
        Law(
            id="closed_gate",
            statement="a gate of zero, or far below it, gives zero",
            check=closed_gate_lets_nothing_through,
        ),
    ),
    workloads=tuple(
        Workload(
            id=f"{rows}x{d_ff}",
            sizes={"shape": (rows, d_ff)},
            bytes_moved=lambda itemsize, n=rows * d_ff: 3 * n * itemsize,
            backward_bytes_moved=lambda itemsize, n=rows * d_ff: 5 * n * itemsize,
            flops=6.0 * rows * d_ff,
            backward_flops=12.0 * rows * d_ff,
        )
        for rows, d_ff in ((256, 1344), (8192, 2048), (8192, 14336))
    ),
    adapter="run_swiglu",
)
