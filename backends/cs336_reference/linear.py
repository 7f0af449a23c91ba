"""The linear transformation: a matrix product."""

from __future__ import annotations

from torch import Tensor

from cs336_registry.components.linear import check


def linear(x: Tensor, weight: Tensor) -> Tensor:
    check(x, weight)
    return x @ weight.T
