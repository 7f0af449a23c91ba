"""A canary for torch.compile: one training step of a tiny model, compiled and not, must agree and hold no NaN.

    python -m cs336_registry.pipeline.canary cpu float32 reference     prints one JSON object

It runs in a process of its own, because a compiler may crash or never end, and it ends with the process that wants to
know.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..compare import root_mean_square, rounding_error

SIZES = {"vocab_size": 97, "context_length": 32, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64}
FACTOR, ROUNDINGS = 4.0, 64.0
"""The compiled step may be FACTOR times as far from float64 as the step that is not compiled, plus ROUNDINGS roundings:
fused kernels sum in another order."""

Values = Mapping[str, Tensor]


def main(device: str, precision: str, backend: str | None) -> dict[str, Any]:
    """Run both steps and judge."""
    import cs336_registry as registry

    build = registry.get("transformer_lm", backend=backend, device=device)
    cross_entropy = registry.get("cross_entropy", backend=backend, device=device)
    torch.manual_seed(336)
    model = build(*SIZES.values()).to(device)
    ids = torch.randint(SIZES["vocab_size"], (2, SIZES["context_length"] + 1), device=device)
    start = time.perf_counter()
    eager = step(model, model, cross_entropy, ids, precision)
    compiled = step(model, torch.compile(model), cross_entropy, ids, precision)
    seconds = time.perf_counter() - start
    with registry.use("reference"):
        exact = registry.get("transformer_lm")(*SIZES.values()).double().to(device)
        plain_loss = registry.get("cross_entropy")
    exact.load_state_dict(model.state_dict())
    truth = step(exact, exact, plain_loss, ids, "float32")
    unit = rounding_error(getattr(torch, precision))
    return {"problem": judge(compiled, eager, truth, unit), "seconds": round(seconds, 1)}


def step(
    model: torch.nn.Module,
    forward: Callable[[Tensor], Tensor],
    cross_entropy: Callable[..., Tensor],
    ids: Tensor,
    precision: str,
) -> dict[str, Tensor]:
    """The loss and every gradient."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = cross_entropy(forward(ids[:, :-1]), ids[:, 1:])
    loss.backward()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"the loss": loss.detach(), **{f"the gradient of {name}": grad for name, grad in gradients.items()}}


def judge(compiled: Values, eager: Values, truth: Values, unit: float) -> str | None:
    """The first value that is wrong, in a sentence; None where all agree."""
    for name, exact in truth.items():
        if name not in compiled:
            return f"{name} is missing"
        if not bool(torch.isfinite(compiled[name]).all()):
            return f"{name} is NaN or infinite"
        scale = root_mean_square(exact)
        error, plain = (root_mean_square(one[name].double() - exact) for one in (compiled, eager))
        allowed = FACTOR * plain + ROUNDINGS * unit * scale
        if not error <= allowed:
            return f"{name} is off by {error:.3g} (without compiling {plain:.3g}, allowed {allowed:.3g})"
    return None


def end_with(parent: int) -> None:
    """End this group of processes, compilers included, when the other end of the pipe `parent` is closed, which it is
    whatever ends its holder."""
    os.read(parent, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("device")
    parser.add_argument("precision")
    parser.add_argument("backend", nargs="?")
    parser.add_argument("--parent", type=int, help="a pipe; this process leads a group that ends with it")
    wanted = parser.parse_args()
    if wanted.parent is not None:
        threading.Thread(target=end_with, args=(wanted.parent,), daemon=True).start()
    print(json.dumps(main(wanted.device, wanted.precision, wanted.backend)))
