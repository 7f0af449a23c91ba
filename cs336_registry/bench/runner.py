"""One benchmark: a fresh process per backend, all of them judged first, then timed in interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from .. import registry
from ..component import Workload
from ..conformance.answering import Answering, Died
from . import rows
from .roofline import Roofline
from .worker import Job, find_workload


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare."""

    component: str
    workload: str
    backends: tuple[str, ...]
    device: str = "cpu"
    dtype: str | None = None
    rounds: int = 9
    seed: int = 0


@contextmanager
def worker(job: Job) -> Iterator[Answering]:
    one = Answering("cs336_registry.bench.worker", f"the worker of {job.backend}")
    try:
        yield one
    finally:
        one.close()


def run(plan: Plan, roofline: Roofline | None = None, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The rows of `plan`: one per backend and direction, or one that says why a backend was refused."""
    contract = registry.contract(plan.component)
    workload = find_workload(contract, plan.workload)
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        workers: dict[str, Answering] = {}
        for backend in plan.backends:
            job = Job(plan.component, backend, plan.workload, plan.dtype, plan.device, plan.seed)
            workers[backend] = stack.enter_context(worker(job))
            # All are judged at the same time: nothing is timed before every one of them has answered.
            workers[backend].tell(asdict(job))
        ready: dict[str, tuple[Answering, dict[str, Any]]] = {}
        for backend, one in workers.items():
            try:
                reply = one.answer()
            except Died as error:
                reply = {"refused": str(error)}
            if "absent" in reply:
                say(f"{plan.component} {backend}: not run: {reply['absent']}")
            elif "refused" in reply:
                say(f"{plan.component} {backend}: no speed, the result is not right: {reply['refused']}")
                found.append(_row(plan, backend, refused=reply["refused"]))
            else:
                ready[backend] = (one, reply)
        replies: dict[str, list[dict[str, Any]]] = {backend: [] for backend in ready}
        for _ in range(plan.rounds):
            for backend, (one, _reply) in ready.items():
                one.tell({"round": len(replies[backend])})
                replies[backend].append(one.answer())
    for backend, (_one, reply) in ready.items():
        for direction in replies[backend][0]["seconds"]:
            seconds = [answer["seconds"][direction] for answer in replies[backend]]
            figures = {
                **_spread(seconds),
                "peak_memory": max(answer["peak_memory"] for answer in replies[backend]),
                "calls_per_round": reply["calls"][direction],
                **_rates(workload, direction, statistics.median(seconds), plan.dtype, roofline),
            }
            origin = {"decision": reply["decision"], "versions": reply["versions"]}
            found.append(_row(plan, backend, direction=direction, **figures, **origin))
    return found


def workloads(component: str, device: str) -> list[Workload]:
    """The workloads of a component that are meant for `device`."""
    return [one for one in registry.contract(component).workloads if one.device in ("any", device)]


def _row(plan: Plan, backend: str, **figures: Any) -> dict[str, Any]:
    return {
        "benchmark": "component",
        "component": plan.component,
        "workload": plan.workload,
        "backend": backend,
        "dtype": plan.dtype,
        "device": plan.device,
        "rounds": plan.rounds,
        **figures,
        **rows.environment(plan.device),
    }


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"seconds": statistics.median(seconds), "seconds_low": quartiles[0], "seconds_high": quartiles[2]}


def _rates(
    workload: Workload, direction: str, seconds: float, dtype: str | None, roofline: Roofline | None
) -> dict[str, Any]:
    """Bytes and FLOP per second, and the share of the limit that binds: the larger of the two shares."""
    itemsize = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}.get(dtype or "", 1)
    count = {"forward": (1, 0), "backward": (0, 1), "both": (1, 1)}[direction]
    moved = [workload.bytes_moved, workload.backward_bytes_moved]
    work = [workload.flops, workload.backward_flops]
    if any(wanted and part is None for wanted, part in zip(count, moved, strict=True)):
        moved_bytes = 0.0
    else:
        moved_bytes = sum(
            wanted * part(itemsize) for wanted, part in zip(count, moved, strict=True) if part is not None
        )
    flops = sum(wanted * part for wanted, part in zip(count, work, strict=True))
    rates: dict[str, Any] = {}
    if moved_bytes:
        rates["bytes_per_second"] = moved_bytes / seconds
    if flops:
        rates["flops_per_second"] = flops / seconds
    if roofline is not None and rates:
        shares = {
            "copy": rates.get("bytes_per_second", 0.0) / roofline.copy_bytes_per_second,
            "matmul": rates.get("flops_per_second", 0.0) / roofline.matmul_flops_per_second,
        }
        limit = max(shares, key=lambda name: shares[name])
        rates |= {"limit": limit, "share_of_limit": shares[limit], "roofline": roofline.to_dict()}
    return rates
