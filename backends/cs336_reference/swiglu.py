"""The gated activation of SwiGLU, as its paper writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from cs336_registry.components.swiglu import check


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    check(gate, up)
    dtype = gate.dtype
    gate, up = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (gate, up))
    return (gate * torch.sigmoid(gate) * up).to(dtype)
