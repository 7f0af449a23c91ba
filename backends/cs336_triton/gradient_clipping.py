"""Gradient clipping in three launches whatever the number of tensors, without asking the device for the norm.

The norm: one float32 partial sum per chunk, then one program that adds them in a fixed order. The scaling reads the
norm where it lies; where nothing is to be clipped its programs leave at once. adamw folds the factor into its own pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from cs336_registry.components.gradient_clipping import check, gradients_of

from .multi_tensor import (
    chunk_of,
    contiguous,
    group_by_type,
    launch_over,
    number_of_chunks,
    operand,
    triton_dtype,
    write_back,
)
from .operators import operator, scalar
from .runtime import PRODUCTION_DTYPES, accumulator, accumulator_dtype, dtype_name, launch, meta, narrow

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CLIP_EPS = 1e-6


def gradient_clipping(
    parameters: Iterable[Tensor] | Tensor, max_l2_norm: float, *, eps: float = 1e-6
) -> Float[Tensor, ""]:
    """Scale all gradients by `max_l2_norm / (norm + eps)` where their norm is larger; see the contract."""
    check(max_l2_norm, eps)
    gradients = gradients_of(parameters)
    if not gradients:
        return torch.zeros(())
    norm = norm_operator(gradients)
    _scale_operator(gradients, norm, max_l2_norm, eps)
    return norm


@triton.jit
def clip_factor(norm_pointer, max_l2_norm, eps, ACCUMULATOR: tl.constexpr):
    """max / (norm + eps) where the norm is larger than max, else 1."""
    norm = tl.load(norm_pointer).to(ACCUMULATOR)
    clipped = scalar(max_l2_norm, ACCUMULATOR) / (norm + scalar(eps, ACCUMULATOR))
    return tl.where(norm > scalar(max_l2_norm, ACCUMULATOR), clipped, 1.0)


@triton.jit
def sum_of_squares_kernel(
    chunk_pointer,
    address_pointer,
    partial_pointer,
    first_partial,
    DTYPE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, first, remaining = chunk_of(chunk_pointer, address_pointer, COLUMNS)
    gradient_pointer = operand(row, first, 0, DTYPE, ALIGNED)
    squares = tl.zeros((BLOCK,), dtype=ACCUMULATOR)
    if remaining >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            gradient = tl.load(gradient_pointer + start + tl.arange(0, BLOCK)).to(ACCUMULATOR)
            squares += gradient * gradient
    else:
        for tail in range(0, remaining, BLOCK):
            at = tail + tl.arange(0, BLOCK)
            gradient = tl.load(gradient_pointer + at, mask=at < remaining, other=0.0).to(ACCUMULATOR)
            squares += gradient * gradient
    tl.store(partial_pointer + first_partial + tl.program_id(0).to(tl.int64), tl.sum(squares, axis=0))


@triton.jit
def root_of_sum_kernel(partial_pointer, norm_pointer, n_partials, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=norm_pointer.dtype.element_ty)
    for start in range(0, n_partials, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial_pointer + at, mask=at < n_partials, other=0.0)
    tl.store(norm_pointer, tl.sqrt(tl.sum(total, axis=0)))


@triton.jit
def scale_kernel(
    chunk_pointer,
    address_pointer,
    norm_pointer,
    max_l2_norm: tl.float64,
    eps: tl.float64,
    DTYPE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = clip_factor(norm_pointer, max_l2_norm, eps, ACCUMULATOR)
    if factor != 1.0:
        row, first, remaining = chunk_of(chunk_pointer, address_pointer, COLUMNS)
        gradient_pointer = operand(row, first, 0, DTYPE, ALIGNED)
        if remaining >= CHUNK:
            for start in range(0, CHUNK, BLOCK):
                at = gradient_pointer + start + tl.arange(0, BLOCK)
                tl.store(at, narrow(tl.load(at).to(ACCUMULATOR) * factor, DTYPE))
        else:
            for tail in range(0, remaining, BLOCK):
                at = tail + tl.arange(0, BLOCK)
                gradient = tl.load(gradient_pointer + at, mask=at < remaining, other=0.0).to(ACCUMULATOR)
                tl.store(gradient_pointer + at, narrow(gradient * factor, DTYPE), mask=at < remaining)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The joint L2 norm, 0-d, on the first gradient's device: float64 if any gradient is, else float32."""
    wide = torch.float64 if any(gradient.dtype == torch.float64 for gradient in gradients) else torch.float32
    first_device = gradients[0].device
    norms = []
    for device in dict.fromkeys(gradient.device for gradient in gradients):
        groups = group_by_type([gradient for gradient in gradients if gradient.device == device])
        norms.append(_norm_on_device(groups, device, wide).to(first_device, non_blocking=True))
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _norm_on_device(groups: list[tuple[list[Tensor], ...]], device: torch.device, wide: torch.dtype) -> Tensor:
    chunks = [number_of_chunks([tensor.numel() for tensor in tensors]) for (tensors,) in groups]
    partials = torch.empty(sum(chunks), dtype=wide, device=device)
    norm = torch.zeros((), dtype=wide, device=device)
    for index, (tensors,) in enumerate(groups):
        launch_over(
            sum_of_squares_kernel,
            [contiguous(tensors)],
            partials,
            sum(chunks[:index]),
            DTYPE=triton_dtype(tensors[0].dtype),
            ACCUMULATOR=accumulator(wide),
            BLOCK=2048,
        )
    if groups:
        launch(root_of_sum_kernel, (1,), partials, norm, sum(chunks), BLOCK=4096, num_warps=8, num_stages=2)
    return norm


def scale(gradients: Sequence[Tensor], norm: Tensor, max_l2_norm: float, eps: float) -> None:
    """Scale the gradients in place by the clip factor of `norm`."""
    for (tensors,) in group_by_type(gradients):
        copies = contiguous(tensors)
        launch_over(
            scale_kernel,
            [copies],
            norm.to(tensors[0].device, non_blocking=True),
            max_l2_norm,
            eps,
            DTYPE=triton_dtype(tensors[0].dtype),
            ACCUMULATOR=accumulator(norm.dtype),
            BLOCK=2048,
        )
        write_back(copies, tensors)


def production_calls() -> Iterator[tuple[str, Any]]:
    for dtype in PRODUCTION_DTYPES:
        gradients = [meta(4096, 4096, dtype=dtype), meta(4096, dtype=dtype)]
        yield f"gradient_norm_{dtype_name(dtype)}", partial(total_norm, gradients)
        yield f"gradient_scale_{dtype_name(dtype)}", partial(scale, gradients, meta(), 1.0, 1e-6)


def _fake_norm(gradients: Sequence[Tensor]) -> Tensor:
    dtypes = {accumulator_dtype(gradient.dtype) for gradient in gradients}
    return gradients[0].new_empty((), dtype=torch.float64 if torch.float64 in dtypes else torch.float32)


norm_operator = operator("gradient_norm(Tensor[] gradients) -> Tensor", total_norm, _fake_norm)
_scale_operator = operator(
    "gradient_scale_(Tensor(a!)[] gradients, Tensor norm, float max_l2_norm, float eps) -> ()",
    scale,
    lambda gradients, norm, max_l2_norm, eps: None,
)
