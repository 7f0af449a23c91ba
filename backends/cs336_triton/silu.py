"""SiLU: one read and one write forward, two reads and one write backward; only x is kept."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cs336_registry.components.silu import check

from .operators import differentiable, operator
from .runtime import PRODUCTION_DTYPES, dtype_name, meta, narrow
from .swiglu import launch_elementwise, sigmoid, tile_of_rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def silu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x * sigmoid(x)` in one pass; see the contract."""
    check(x)
    return _operator(x)


@triton.jit
def forward_kernel(
    x_pointer,
    output_pointer,
    n_rows,
    n_cols,
    x_stride,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns, mask = tile_of_rows(n_rows, n_cols, ROWS, BLOCK)
    x = tl.load(x_pointer + rows * x_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
    output = narrow(x * sigmoid(x), output_pointer.dtype.element_ty)
    tl.store(output_pointer + rows * n_cols + columns, output, mask=mask)


@triton.jit
def backward_kernel(
    grad_pointer,
    x_pointer,
    x_grad_pointer,
    n_rows,
    n_cols,
    grad_stride,
    x_stride,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns, mask = tile_of_rows(n_rows, n_cols, ROWS, BLOCK)
    grad = tl.load(grad_pointer + rows * grad_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
    x = tl.load(x_pointer + rows * x_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
    open_share = sigmoid(x)
    x_grad = narrow(grad * open_share * (1.0 + x * (1.0 - open_share)), x_grad_pointer.dtype.element_ty)
    tl.store(x_grad_pointer + rows * n_cols + columns, x_grad, mask=mask)


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        x = meta(8192, 14336, dtype=dtype)
        yield f"silu_forward_{dtype_name(dtype)}", partial(_forward, x)
        yield f"silu_backward_{dtype_name(dtype)}", partial(_backward, x, x)


def _forward(x: Tensor) -> Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch_elementwise(forward_kernel, "silu_forward", (x,), (output,))
    return output


def _backward(grad: Tensor, x: Tensor) -> Tensor:
    x_grad = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch_elementwise(backward_kernel, "silu_backward", (grad, x), (x_grad,))
    return x_grad


_operator = operator("silu(Tensor x) -> Tensor", _forward, lambda x: x.new_empty(x.shape))
_backward_operator = operator(
    "silu_backward(Tensor grad, Tensor x) -> Tensor", _backward, lambda grad, x: x.new_empty(x.shape)
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> Tensor:
    return _backward_operator(grad, *ctx.saved_tensors)


differentiable(_operator, _gradients, _setup_context)
