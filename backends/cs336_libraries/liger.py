"""Liger-Kernel: Triton kernels of the training operators, on a GPU."""

from __future__ import annotations

import os

from cs336_registry.components import cross_entropy as cross_entropy_contract
from cs336_registry.components import rmsnorm as rmsnorm_contract
from cs336_registry.components import softmax as softmax_contract
from cs336_registry.components import swiglu as swiglu_contract
from cs336_registry.machine import Machine
from cs336_registry.plugin import Backend, Implementation, hookimpl

DEVICES = {("cuda", "interpreter"): ("softmax", "cross_entropy"), ("cuda",): ("rmsnorm", "swiglu")}
"""The kernels of the latter convert numbers that Triton's interpreter hands over as plain Python floats."""


@hookimpl
def cs336_backend() -> Backend:
    # Triton's interpreter holds bfloat16 as 16-bit integers, which Liger's backward kernels multiply as they are.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    claims = [
        Implementation(
            component=name,
            target=f"{__name__}:{name}",
            dtypes=("float32",) if interpreted else ("float32", "bfloat16"),
            devices=devices,
            gradient=True,
        )
        for devices, names in DEVICES.items()
        for name in names
    ]
    return Backend(
        name="liger",
        summary="Liger-Kernel's Triton kernels",
        requires=("torch", "triton", "liger_kernel"),
        cure="pip install 'cs336-registry[liger]'",
        implementations=tuple(claims),
    )


@hookimpl
def cs336_probe(machine: Machine) -> str | None:
    if not machine.cuda_devices and not machine.triton_interpreter:
        return f"it needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter: {machine.cuda_problem}"
    return None


def rmsnorm(x, weight, eps=1e-5):
    """In Liger's "gemma" mode, which multiplies by the gain in float32 as the contract does, and not in place."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    rmsnorm_contract.check(x, weight, eps)
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "gemma", False)


def swiglu(gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    swiglu_contract.check(gate, up)
    return LigerSiLUMulFunction.apply(gate, up)


def softmax(x, dim=-1):
    """Liger's works along the last dimension; another one is moved there."""
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    softmax_contract.check(x, dim)
    return LigerSoftmaxFunction.apply(x.transpose(dim, -1).contiguous()).transpose(dim, -1)


def cross_entropy(logits, targets, *, reduction="mean"):
    """Liger writes the gradient over the logits, which the contract forbids: it gets a copy where it computes one, with
    contiguous rows, since it loses the gradient of those that it has to make contiguous. It refuses a batch of none."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from torch.nn import functional

    cross_entropy_contract.check(logits, targets, reduction)
    rows, row_targets = logits.reshape(-1, logits.shape[-1]).contiguous(), targets.reshape(-1)
    if not len(rows):
        loss = functional.cross_entropy(rows, row_targets.long(), reduction=reduction)
    else:
        rows = rows.clone() if rows.requires_grad else rows
        loss = LigerCrossEntropyFunction.apply(rows, row_targets, None, -100, 0.0, 0.0, reduction)[0]
    return loss.reshape(targets.shape) if reduction == "none" else loss
