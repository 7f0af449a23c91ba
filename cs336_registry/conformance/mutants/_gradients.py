"""Breaking a backward pass and leaving the forward pass alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(context, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        context.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context, *upstream: Tensor) -> tuple[Tensor, None]:
        return context.change(upstream[0]), None


def changed_gradient(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor` itself; the gradient that arrives here goes on as `change(gradient)`."""
    return _Changed.apply(tensor, change)
