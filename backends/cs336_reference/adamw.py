"""AdamW: decay the parameter first, then take the bias-corrected step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cs336_registry.components.adamw import check


class AdamW(torch.optim.Optimizer):
    """See the contract. One parameter at a time, one line per formula."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        settings = self.defaults | param_group
        check(settings["lr"], settings["betas"], settings["eps"], settings["weight_decay"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=wide)
        state["step"] += 1
        t = int(state["step"])
        gradient, value = parameter.grad.to(wide), parameter.to(wide)

        value = value - lr * group["weight_decay"] * value
        m = state["exp_avg"].mul_(beta1).add_((1 - beta1) * gradient)
        v = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * gradient**2)
        m_hat = m / (1 - beta1**t)
        v_hat = v / (1 - beta2**t)
        parameter.copy_(value - lr * m_hat / (v_hat.sqrt() + group["eps"]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base class does it, which rounds every state to its parameter's dtype; the moments stay wide here."""
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved_ids, parameters, strict=True):
            wide = torch.promote_types(parameter.dtype, torch.float32)
            for name, value in state_dict["state"].get(index, {}).items():
                if name in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][name] = value.to(parameter.device, wide, copy=True)
