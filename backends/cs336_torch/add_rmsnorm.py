"""A residual addition followed by `F.rms_norm`; PyTorch fuses the two only under torch.compile."""

from __future__ import annotations

from torch import Tensor

from cs336_registry.components.add_rmsnorm import check

from .rmsnorm import rmsnorm


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    check(x, residual, weight, eps)
    total = x + residual
    return rmsnorm(total, weight, eps), total
