"""How this backend's kernels become PyTorch operators, and the number helper for hyperparameters.

The operators live in the namespace `torch.ops.cs336_triton`. They are defined through `torch.library.Library` and not
through `torch.library.custom_op`, whose wrapper about doubles the host time of a call (on one CPU core: 9 against
21 microseconds without gradients, 21 against 32 with); `torch.library.opcheck` holds for them all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from .runtime import INTERPRETING

_INTERPRETING: tl.constexpr = tl.constexpr(INTERPRETING)
_library = torch.library.Library("cs336_triton", "FRAGMENT")


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `schema` ("name(Tensor x) -> Tensor"), run by `implementation` on CUDA and in the interpreter on the CPU.

    `fake` answers with the shapes, strides and dtypes alone. Outputs must not share memory with inputs.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"cs336_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.cs336_triton, name).default


def differentiable(operator: Any, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give `operator` a gradient, as `torch.library.register_autograd` describes."""
    torch.library.register_autograd(operator._schema.name, backward, setup_context=setup_context, lib=_library)


def power_of_two_up_to(limit: int, at_least: int) -> int:
    """The smallest power of two that holds `at_least` entries (at least 1), but no more than `limit`."""
    return min(triton.next_power_of_2(max(at_least, 1)), limit)


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A float argument in the accumulator's type; use the call inside an expression, never by way of a variable.

    Float arguments are annotated `tl.float64`, so that float64 kernels see all their digits. In the interpreter they
    are plain Python floats, which an assignment would round to float32.
    """
    if _INTERPRETING:
        return value
    else:
        return value.to(dtype)
