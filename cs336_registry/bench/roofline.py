"""The limits of this machine, measured in the run that quotes them: copying memory and multiplying matrices."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from .measurement import calls_for, seconds_per_call

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
MATRIX_SIZE = {"cpu": 1536, "cuda": 8192}
ROUNDS = 7


@dataclass(frozen=True)
class Roofline:
    """Bytes per second of a large copy (read plus written) and FLOP/s of a large matrix product in the rows' dtype.

    On a CPU a copy first reads what it overwrites, which is not counted: work that writes where it has read, as AdamW
    does, may reach one and a half times its rate, and more where everything fits in the caches.
    """

    copy_bytes_per_second: float
    matmul_flops_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(device: str, dtype: str) -> Roofline:
    """Medians over several rounds, on random data: zeros can run faster than any real input."""
    import torch

    source = torch.randint(0, 255, (COPY_BYTES[device],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size, kind = MATRIX_SIZE[device], getattr(torch, dtype)
    left, right = (torch.randn(size, size, dtype=kind, device=device) for _ in range(2))
    copy = _median(lambda: target.copy_(source), device)
    product = _median(lambda: left @ right, device)
    return Roofline(2 * COPY_BYTES[device] / copy, 2 * size**3 / product)


def _median(call, device: str) -> float:
    calls = calls_for(call, device, budget=0.1)
    return statistics.median(seconds_per_call(call, calls, device) for _ in range(ROUNDS))
