"""The process in which one backend is judged and then timed: `python -m cs336_registry.bench.worker`.

It reads one job as a line of JSON, answers whether the gate was passed, and then times a round for every line it is
sent. No round runs unless the gate was passed in this very process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import registry
from ..component import Case, Component, Workload
from ..conformance.answering import answers
from .measurement import calls_for, rotation, seconds_per_call

if TYPE_CHECKING:
    from ..conformance.trial import Trial

ROUND_SECONDS = 0.15
CACHE_BYTES = 2**28
"""Input sets are rotated until together they exceed any cache."""


@dataclass(frozen=True)
class Job:
    """What to judge and time."""

    component: str
    backend: str
    workload: str
    dtype: str | None
    device: str
    seed: int = 0


class Absent(Exception):
    """The backend can't run this here."""


class Refused(Exception):
    """The gate was not passed: there is no speed to speak of."""


def gate(job: Job, folder: Path) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The backend's callable and its Decision, after it passed the contract's cases, gradients and laws, and the
    workload.

    Raises Absent where there is nothing to run, Refused with the first failing check.
    """
    from ..conformance.checks import checks
    from ..conformance.subject import find
    from ..conformance.trial import Trial
    from ..machine import detect

    subject = find(job.backend, job.component)
    if subject.claims is None:
        raise Absent(subject.reason)
    contract, machine = registry.contract(job.component), detect()
    if job.device == "cpu" and contract.dtypes and "cpu" not in subject.claims.devices:
        raise Absent(f"{job.backend} does not claim the CPU: an interpreter's timings mean nothing")
    decision, implementation = subject.decision(), subject.load()
    trial = Trial(folder=folder, seed=job.seed, device=job.device)
    for check in checks(contract):
        if check.group not in ("signature", "case", "gradient", "law") or check.dtype not in (None, job.dtype):
            continue
        if check.unclaimed(subject.claims, machine, job.device):
            continue
        try:
            check.run(implementation, subject.claims, trial)
        except Exception as error:
            raise Refused(f"{check}: {type(error).__name__}: {error}") from error
    try:
        _judge_workload(contract, implementation, job, trial)
    except Exception as error:
        raise Refused(f"workload {job.workload}: {type(error).__name__}: {error}") from error
    return implementation, decision.to_dict()


def _judge_workload(contract: Component, implementation: Callable[..., Any], job: Job, trial: Trial) -> None:
    """The result at the size that is timed. Exact components are held against the reference there: the naive oracle,
    which the reference is proven against, would take hours.
    """
    from ..conformance.trial import assert_agrees
    from ..conformance.values import first_difference

    case = workload_case(contract, job.workload)
    found = contract.run(implementation, trial.arguments(contract, case, job.dtype))
    if not contract.exact:
        assert_agrees(contract, found, case, job.dtype, trial)
    elif job.backend != registry.DEFAULT_BACKEND:
        reference = registry.get(job.component, backend=f"{registry.DEFAULT_BACKEND}!")
        difference = first_difference(found, contract.run(reference, trial.arguments(contract, case, job.dtype)))
        assert difference is None, difference


def find_workload(contract: Component, name: str) -> Workload:
    for workload in contract.workloads:
        if workload.id == name:
            return workload
    known = ", ".join(workload.id for workload in contract.workloads)
    raise ValueError(f"{contract.name} has no workload {name!r}; it has {known}")


def workload_case(contract: Component, name: str, variant: int = 0) -> Case:
    """The arguments of a workload as a case; another `variant` has other numbers of the same sizes."""
    workload = find_workload(contract, name)
    return Case(id=workload.id, sizes=workload.sizes, seed=variant)


def prepare(
    contract: Component, implementation: Callable[..., Any], job: Job, folder: Path
) -> dict[str, Callable[[], Any]]:
    """Direction -> the callable to time; gradients are timed where the contract has them."""
    from ..conformance.trial import Trial

    trial = Trial(folder=folder, seed=job.seed, device=job.device)

    def arguments(variant: int) -> dict[str, Any]:
        return trial.arguments(contract, workload_case(contract, job.workload, variant), job.dtype)

    first = arguments(0)
    copies = max(1, min(8, CACHE_BYTES // max(_bytes(first), 1))) if contract.kind == "op" else 1
    sets = [first, *(arguments(variant) for variant in range(1, copies))]
    if contract.timed is not None:
        return {"forward": rotation([contract.timed(implementation, arguments) for arguments in sets])}
    if not contract.differentiable:
        return {"forward": rotation([lambda a=a: contract.run(implementation, a) for a in sets])}
    return _with_gradients(contract, implementation, sets)


def _with_gradients(
    contract: Component, implementation: Callable[..., Any], sets: list[dict[str, Any]]
) -> dict[str, Callable[[], Any]]:
    """Forward without a graph, backward alone over a kept graph, and both as a training step runs them."""
    import torch

    from ..conformance.values import is_floating, leaves, rebuilt

    def leaf(value: Any) -> Any:
        return value.detach().requires_grad_() if is_floating(value) else value

    def outputs_of(arguments: dict[str, Any]) -> list[Any]:
        return [value for _, value in leaves(contract.run(implementation, arguments)) if is_floating(value)]

    def forward(arguments: dict[str, Any]) -> None:
        with torch.no_grad():
            contract.run(implementation, arguments)

    turns: dict[str, list[Callable[[], Any]]] = {"forward": [], "backward": [], "both": []}
    for arguments in sets:
        named = {name: rebuilt(v, leaf) if name in contract.differentiable else v for name, v in arguments.items()}
        inputs = [v for name in contract.differentiable for _, v in leaves(named.get(name)) if is_floating(v)]
        graph = outputs_of(named)
        upstream = [torch.randn_like(output) for output in graph]
        turns["forward"].append(lambda a=arguments: forward(a))
        turns["backward"].append(
            lambda g=graph, i=inputs, u=upstream: torch.autograd.grad(g, i, u, retain_graph=True, allow_unused=True)
        )
        turns["both"].append(
            lambda n=named, i=inputs, u=upstream: torch.autograd.grad(outputs_of(n), i, u, allow_unused=True)
        )
    return {direction: rotation(calls) for direction, calls in turns.items()}


def _bytes(arguments: dict[str, Any]) -> int:
    from ..conformance.values import is_tensor, leaves

    return sum(leaf.nbytes for _, leaf in leaves(arguments) if is_tensor(leaf))


def peak_memory(device: str) -> int:
    """Bytes: the GPU allocator's peak since the last call, or this process's peak resident set."""
    if device == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def versions() -> dict[str, str]:
    """The versions of what ran, read from the modules that this process imported."""
    names = ("torch", "triton", "numpy", "numba", "regex", "tokenizers", "tiktoken")
    found = {name: str(getattr(sys.modules[name], "__version__", "")) for name in names if name in sys.modules}
    return {"python": sys.version.split()[0], **found}


def main() -> None:
    """Serve one job: a line of JSON in, a line out, then a line of times for every line after it."""
    answer = answers()
    job = Job(**json.loads(sys.stdin.readline()))
    with tempfile.TemporaryDirectory() as name:
        try:
            implementation, decision = gate(job, Path(name))
        except Absent as absence:
            return answer({"absent": str(absence)})
        except Refused as refusal:
            return answer({"refused": str(refusal)})
        turns = prepare(registry.contract(job.component), implementation, job, Path(name))
        peak_memory(job.device)
        calls = {way: calls_for(turn, job.device, budget=ROUND_SECONDS) for way, turn in turns.items()}
        answer({"decision": decision, "calls": calls, "versions": versions()})
        for _ in sys.stdin:
            seconds = {way: seconds_per_call(turn, calls[way], job.device) for way, turn in turns.items()}
            answer({"seconds": seconds, "peak_memory": peak_memory(job.device)})


if __name__ == "__main__":
    main()
