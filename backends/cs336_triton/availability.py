"""Can this backend run here, or which of four things is in the way? Asked before torch or Triton is imported."""

from __future__ import annotations

import importlib.util
from typing import Any

OLDEST_CAPABILITY = (8, 0)


def probe(machine: Any) -> str | None:
    """None where the kernels can run; otherwise one sentence that names what is in the way and what cures it.

    `machine` has `cuda_devices` (each with `name` and `capability`) and `triton_interpreter` (TRITON_INTERPRET is on).
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: `pip install triton` (Linux), or choose another backend"
    if machine.triton_interpreter:
        return _interpreter_beside_a_card(machine.cuda_devices[0]) if machine.cuda_devices else None
    if not machine.cuda_devices:
        return (
            "triton is installed but no CUDA device is visible (no active driver): use a machine with an NVIDIA card "
            "and its driver, check CUDA_VISIBLE_DEVICES, or set TRITON_INTERPRET=1 before Python starts to run the "
            "kernels on the CPU in Triton's interpreter (slow)"
        )
    if all(tuple(device.capability) < OLDEST_CAPABILITY for device in machine.cuda_devices):
        device = machine.cuda_devices[0]
        major, minor = device.capability
        return (
            f"the card is too old: {device.name} has compute capability {major}.{minor} and the kernels need 8.0 or "
            f"newer (A100, H100, RTX 30 or later): use such a card, or the backend torch"
        )
    return None


def _interpreter_beside_a_card(device: Any) -> str:
    return (
        f"TRITON_INTERPRET=1 runs every kernel in Triton's interpreter on the CPU although {device.name} is visible: "
        f"unset it to use the card, or set CUDA_VISIBLE_DEVICES= (empty) to mean the CPU"
    )
