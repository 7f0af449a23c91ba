"""Timing one callable on one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def seconds_per_call(call: Callable[[], Any], calls: int, device: str) -> float:
    """Mean seconds of `calls` calls in a row: GPU time between two events, or wall time on the CPU."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def calls_for(call: Callable[[], Any], device: str, *, budget: float) -> int:
    """How many calls fill `budget` seconds; the first calls warm caches and compilers up."""
    for _ in range(2):
        seconds_per_call(call, 1, device)
    return max(1, min(10_000, int(budget / max(seconds_per_call(call, 1, device), 1e-7))))


def host_seconds(call: Callable[[], Any], calls: int = 20) -> float:
    """Seconds that Python and the libraries take to put one call's work before the card, which is not waited for."""
    import torch

    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return min(found)


def rotation(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """One callable that goes round `calls`, so that inputs are not served from the cache of the call before."""
    position = 0

    def turn() -> Any:
        nonlocal position
        position = (position + 1) % len(calls)
        return calls[position]()

    return turn
