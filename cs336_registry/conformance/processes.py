"""Several processes call one component at once: `python -m cs336_registry.conformance.processes` is one of them.

What a backend keeps outside its process (compiled kernels, caches, temporary files) is shared by all processes of a
machine, and what it derives from the hashes of strings differs in every one of them. The processes are started once
and serve every component of a session, which each of them therefore calls for the first time together with the others.
"""

from __future__ import annotations

import atexit
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import registry
from ..plugin import Implementation
from .answering import Answering, Died, answers

if TYPE_CHECKING:
    from .trial import Trial

PROCESSES = 2
ROUNDS = 2
SECONDS = 300.0
"""For one component: a process that waits for ever for another's lock must not stop the session."""

_started: list[Answering] = []


def judge_in_processes(component: str, dtype: str | None, trial: Trial) -> None:
    """Every process runs the claimed cases, each in another order, and holds them against the oracle.

    Raises AssertionError with what the first process that failed says.
    """
    assert trial.origin is not None, "a process can't find the implementation: give the Trial an origin"
    job = {"origin": trial.origin, "component": component, "dtype": dtype, "seed": trial.seed, "device": trial.device}
    workers = _started or _start()
    try:
        for number, worker in enumerate(workers):
            worker.tell(job | {"number": number})
        failures = [worker.answer(SECONDS)["failure"] for worker in workers]
        ready = [worker for worker, failure in zip(workers, failures, strict=True) if not failure]
        for worker in ready:
            worker.tell({"begin": len(ready) == len(workers)})
        if len(ready) == len(workers):
            failures = [worker.answer(SECONDS)["failure"] for worker in workers]
    except Died as death:
        stop()
        raise AssertionError(f"{len(workers)} processes called it at once: {death}") from death
    failure = next(filter(None, failures), "")
    assert not failure, f"{len(workers)} processes called it at once: {failure}"


def _start() -> list[Answering]:
    for number in range(PROCESSES):
        # Other hashes of strings, other orders of sets.
        environment = {"PYTHONHASHSEED": str(number + 1), "OMP_NUM_THREADS": "1"}
        _started.append(Answering(__name__, f"process {number}", environment))
    return _started


@atexit.register
def stop() -> None:
    """End the processes; the next check starts new ones."""
    while _started:
        _started.pop().close()


def _found(origin: list[str], component: str) -> tuple[Callable[..., Any], Implementation]:
    """The implementation that an origin names, and its claims."""
    kind, name = origin
    if kind == "mutant":
        from .mutants import mutants
        from .mutation import all_claims

        (one,) = (one for one in mutants([component]) if one.name == name)
        return one.build(), all_claims(registry.contract(component))
    from .subject import find

    subject = find(name, component)
    assert subject.claims is not None, subject.reason
    return subject.load(), subject.claims


def _serve(job: dict[str, Any], folder: Path, begin: Callable[[], bool]) -> bool:
    """Prepare, wait for the others, run. False where another could not be prepared and nothing was run.

    Raises AssertionError, or whatever the implementation raises, where it is wrong.
    """
    from .checks import claimed_cases
    from .trial import Trial, assert_agrees

    implementation, claims = _found(job["origin"], job["component"])
    contract, dtype = registry.contract(job["component"]), job["dtype"]
    trial = Trial(folder=folder, seed=job["seed"], device=job["device"])
    cases = claimed_cases(contract, claims, dtype, trial.device)
    turn = len(cases) // PROCESSES * job["number"]
    order = (cases[turn:] + cases[:turn]) * ROUNDS
    prepared = [(case, trial.arguments(contract, case, dtype)) for case in order]
    if not begin():
        return False
    found = [(case, contract.run(implementation, arguments)) for case, arguments in prepared]
    for case, result in found:
        assert_agrees(contract, result, case, dtype, trial)
    return True


def main() -> None:
    """Answer every job when it is prepared and again when it has run; a failure ends it, wherever it occurs."""
    answer = answers()

    def begin() -> bool:
        answer({"failure": ""})
        return json.loads(sys.stdin.readline() or '{"begin": false}')["begin"]

    while line := sys.stdin.readline():
        with tempfile.TemporaryDirectory() as folder:
            try:
                if _serve(json.loads(line), Path(folder), begin):
                    answer({"failure": ""})
            except Exception as error:
                answer({"failure": f"{type(error).__name__}: {error}".partition("\n")[0]})


if __name__ == "__main__":
    main()
