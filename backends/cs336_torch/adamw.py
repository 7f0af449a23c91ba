"""torch.optim.AdamW with its fused kernel, which updates all parameters in one launch.

float32 and float64 parameters only: for narrower ones PyTorch keeps the moments in the parameter's dtype, and the
contract keeps them in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cs336_registry.components.adamw import check

WITH_FUSED_KERNEL = ("cpu", "cuda")


class AdamW(torch.optim.AdamW):
    """See the contract."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        params = list(params)
        fused = all(tensor.device.type in WITH_FUSED_KERNEL for tensor in _tensors(params))
        check(lr, betas, eps, weight_decay)
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = self.defaults | param_group
        check(settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"])
        super().add_param_group(param_group)
        for tensor in _tensors([param_group]):
            if tensor.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"adamw of backend torch keeps no float32 moments for {tensor.dtype} parameters: keep the "
                    f"parameters in float32 (autocast computes in {tensor.dtype}), or choose 'adamw=reference'"
                )


def _tensors(params: list[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for entry in params:
        listed = entry["params"] if isinstance(entry, dict) else entry
        found += [listed] if isinstance(listed, Tensor) else listed
    return found
