"""How this backend's kernels become PyTorch operators, and the number helper for hyperparameters.

Every operator has two ways in. Compilers, functional transforms, fake and other wrapped tensors meet
`torch.ops.cs336_triton.<name>`, for which `torch.library.opcheck` holds. Ordinary tensors in eager mode are spared
PyTorch's dispatcher: the host function is called at once, within one `torch.autograd.Function` where a gradient is
wanted. Where the card has less than a millisecond's work, the host's time is what counts (see benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .runtime import INTERPRETING, next_power_of_2

_INTERPRETING: tl.constexpr = tl.constexpr(INTERPRETING)
_library = torch.library.Library("cs336_triton", "FRAGMENT")
_ORDINARY = (torch.Tensor, torch.nn.Parameter)


class Operator:
    """One operator: call it. `overload` is what it is called in `torch.ops`."""

    def __init__(self, overload: Any, implementation: Callable[..., Any]) -> None:
        self.overload = overload
        self.implementation = implementation
        self.function: Any = None
        """The `torch.autograd.Function` of a differentiable operator."""

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
            return self.overload(*arguments, **keywords)
        requires_grad = False
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                if type(argument) not in _ORDINARY or argument.is_meta:
                    return self.overload(*arguments, **keywords)
                requires_grad = requires_grad or argument.requires_grad
        if requires_grad and torch.is_grad_enabled():
            if self.function is None:
                return self.overload(*arguments, **keywords)
            return self.function.apply(*arguments)
        return self.implementation(*arguments, **keywords)


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `schema` ("name(Tensor x) -> Tensor"), run by `implementation` on CUDA and in the interpreter on the CPU.

    `fake` answers with the shapes, strides and dtypes alone. Outputs must not share memory with inputs. Arguments that
    are tensors are given by position. An operator of lists works on many tensors at once: it is left to the dispatcher,
    which also notes what is written to.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, implementation, device)
    torch.library.register_fake(f"cs336_triton::{name}", fake, lib=_library)
    overload = getattr(torch.ops.cs336_triton, name).default
    return overload if "[]" in schema else Operator(overload, implementation)


def differentiable(operator: Operator, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give `operator` a gradient, as `torch.library.register_autograd` describes; arguments are given by position."""
    torch.library.register_autograd(operator.overload._schema.name, backward, setup_context=setup_context, lib=_library)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = operator.implementation(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    operator.function = Eager


def power_of_two_up_to(limit: int, at_least: int) -> int:
    """The smallest power of two that holds `at_least` entries (at least 1), but no more than `limit`."""
    return min(next_power_of_2(max(at_least, 1)), limit)


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
