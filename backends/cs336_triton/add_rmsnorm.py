"""Residual addition and RMSNorm in one pass: two reads and two writes instead of three and two.

The kernels are those of rmsnorm.py with ADD. The gradient of both addends is the same tensor: what comes through the
norm plus what comes through the sum, added in float32 before it is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from cs336_registry.components.add_rmsnorm import check

from .operators import differentiable, operator
from .rmsnorm import backward, forward
from .runtime import PRODUCTION_DTYPES, accumulator_dtype, dtype_name, meta

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def add_rmsnorm(
    x: Float[Tensor, "... d_model"],
    residual: Float[Tensor, "... d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, "... d_model"]]:
    """`(rmsnorm(x + residual), x + residual)` in one pass; see the contract."""
    check(x, residual, weight, eps)
    normed, total, _ = _operator(x, residual, weight, eps)
    return normed, total


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        for n_rows, n_cols in ((8192, 768), (16384, 4096), (4096, 16384), (1024, 65536)):
            x, weight, rstd = meta(n_rows, n_cols, dtype=dtype), meta(n_cols, dtype=dtype), meta(n_rows)
            name = f"{dtype_name(dtype)}_{n_cols}"
            yield f"add_rmsnorm_forward_{name}", partial(forward, x, x, weight, 1e-5)
            yield f"add_rmsnorm_backward_{name}", partial(backward, x, x, x, weight, rstd)


def _fake_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=accumulator_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


def _fake_backward(
    grad: Tensor, total_grad: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


_operator = operator(
    "add_rmsnorm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    forward,
    _fake_forward,
)
_backward_operator = operator(
    "add_rmsnorm_backward(Tensor grad, Tensor? total_grad, Tensor total, Tensor weight, Tensor rstd)"
    " -> (Tensor, Tensor)",
    backward,
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    weight = inputs[2]
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    # A result that nobody used has no gradient: better no tensor than a tensor of zeros to write and read.
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad: Tensor | None, total_grad: Tensor | None, _: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if grad is None:
        return total_grad, total_grad, None, None
    x_grad, weight_grad = _backward_operator(grad, total_grad, *ctx.saved_tensors)
    return x_grad, x_grad, weight_grad, None


differentiable(_operator, _gradients, _setup_context)
