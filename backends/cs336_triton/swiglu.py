"""SwiGLU's elementwise part, and the launch that every elementwise op of this backend shares.

Two reads and one write forward, three reads and two writes backward: only gate and up are kept, and silu is computed
again in the backward pass. Rows may be apart in memory (the two halves of one fused projection are), so they are
walked as a matrix of tiles; contiguous operands are one long row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cs336_registry.components.swiglu import check

from .configurations import Configuration, configuration
from .operators import differentiable, operator, power_of_two_up_to
from .runtime import PRODUCTION_DTYPES, Card, accumulator, cdiv, contiguous_rows, dtype_name, launch, meta, narrow

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def swiglu(gate: Float[Tensor, "*shape"], up: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`silu(gate) * up` in one pass; see the contract."""
    check(gate, up)
    return _operator(gate, up)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), whose exponential never overflows."""
    decay = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, decay) / (1.0 + decay)


@triton.jit
def tile_of_rows(n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, columns, mask) of this program's tile; the programs cover a matrix, column tile by column tile."""
    # In int64: a row that ends less than BLOCK before 2^31 would come to a negative number of tiles.
    column_tiles = tl.cdiv(tl.cast(n_cols, tl.int64), BLOCK)
    program = tl.program_id(0).to(tl.int64)
    rows = (program // column_tiles) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (program % column_tiles) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return rows, columns, (rows < n_rows) & (columns < n_cols)


@triton.jit
def forward_kernel(
    gate_pointer,
    up_pointer,
    output_pointer,
    n_rows,
    n_cols,
    gate_stride,
    up_stride,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns, mask = tile_of_rows(n_rows, n_cols, ROWS, BLOCK)
    gate = tl.load(gate_pointer + rows * gate_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
    up = tl.load(up_pointer + rows * up_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
    output = gate * sigmoid(gate) * up
    tl.store(output_pointer + rows * n_cols + columns, narrow(output, output_pointer.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    grad_pointer,
    gate_pointer,
    up_pointer,
    gate_grad_pointer,
    up_grad_pointer,
    n_rows,
    n_cols,
    grad_stride,
    gate_stride,
    up_stride,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, columns, mask = tile_of_rows(n_rows, n_cols, ROWS, BLOCK)
    grad = tl.load(grad_pointer + rows * grad_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
    gate = tl.load(gate_pointer + rows * gate_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
    up = tl.load(up_pointer + rows * up_stride + columns, mask=mask, other=0.0).to(ACCUMULATOR)
    open_share = sigmoid(gate)
    up_grad = grad * gate * open_share
    gate_grad = grad * up * open_share * (1.0 + gate * (1.0 - open_share))
    at = rows * n_cols + columns
    tl.store(gate_grad_pointer + at, narrow(gate_grad, gate_grad_pointer.dtype.element_ty), mask=mask)
    tl.store(up_grad_pointer + at, narrow(up_grad, up_grad_pointer.dtype.element_ty), mask=mask)


def launch_elementwise(kernel: Any, name: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    """Run an elementwise kernel with the parameters (inputs, outputs, n_rows, n_cols, input strides); outputs are
    contiguous, inputs any views of the same shape."""
    output = outputs[0]
    n_entries, device, dtype = output.numel(), output.device, output.dtype
    for tensor in inputs:
        if not tensor.is_contiguous():
            inputs = tuple([contiguous_rows(tensor) for tensor in inputs])
            n_rows, n_cols = inputs[0].shape
            strides = [tensor.stride(0) for tensor in inputs]
            break
    else:
        n_rows, n_cols, strides = 1, n_entries, (n_entries,) * len(inputs)
    chosen = configuration(name, device, dtype, "any", default_tile)
    entries = chosen["ENTRIES"]
    block = power_of_two_up_to(entries, n_cols)
    rows = 1 if n_rows == 1 else power_of_two_up_to(entries // block, n_rows)
    launch(
        kernel,
        (cdiv(n_rows, rows) * cdiv(n_cols, block) if n_entries else 0,),
        *inputs,
        *outputs,
        n_rows,
        n_cols,
        *strides,
        ACCUMULATOR=accumulator(dtype),
        ROWS=rows,
        BLOCK=block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def default_tile(card: Card) -> Configuration:
    """16 entries a thread: two 16-byte accesses of bfloat16, enough loads in flight to cover the latency."""
    return Configuration.of(num_warps=4, ENTRIES=2048)


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        gate = meta(8192, 14336, dtype=dtype)
        half = meta(8192, 28672, dtype=dtype)[:, :14336]
        for name, operand in (("contiguous", gate), ("halves", half)):
            yield f"swiglu_forward_{dtype_name(dtype)}_{name}", partial(_forward, operand, operand)
            yield f"swiglu_backward_{dtype_name(dtype)}_{name}", partial(_backward, gate, operand, operand)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    output = torch.empty_like(gate, memory_format=torch.contiguous_format)
    launch_elementwise(forward_kernel, "swiglu_forward", (gate, up), (output,))
    return output


def _fake_forward(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    gate_grad = torch.empty_like(gate, memory_format=torch.contiguous_format)
    up_grad = torch.empty_like(gate_grad)
    launch_elementwise(backward_kernel, "swiglu_backward", (grad, gate, up), (gate_grad, up_grad))
    return gate_grad, up_grad


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


_operator = operator("swiglu(Tensor gate, Tensor up) -> Tensor", _forward, _fake_forward)
_backward_operator = operator(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)", _backward, _fake_backward
)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_operator(grad, *ctx.saved_tensors)


differentiable(_operator, _gradients, _setup_context)
