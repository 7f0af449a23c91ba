"""The gated activation of SwiGLU through `F.silu`; in half precision the product is taken in float32, to round once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cs336_registry.components.swiglu import check


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    check(gate, up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up).to(gate.dtype)
