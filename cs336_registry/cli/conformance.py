"""`cs336 conformance` and `cs336 mutants`: the proof."""

from __future__ import annotations

import sys
from pathlib import Path


def conformance(
    *backends: str,
    components: list[str] | None = None,
    dtypes: list[str] | None = None,
    audit: bool = False,
    strict: bool = False,
    seed: int = 0,
    seeds: int = 1,
    json: Path | None = None,
    junit: Path | None = None,
    workers: int = 0,
    rows: Path | None = None,
) -> int:
    """Judge backends by the contracts of what they claim: cases, gradients, laws, errors, layouts, determinism.

    Example: `cs336 conformance mine --components rmsnorm`. The same kit runs as
    `pytest --pyargs cs336_registry.conformance --cs336-backend=mine`.

    Parameters
    ----------
    backends
        Names of backends, or all.
    components
        Only these components, or all; what the backends provide by default.
    dtypes
        Only these floating types.
    audit
        Run what is not claimed too, and say which claims could be made.
    strict
        Fail where something is skipped because it is not claimed.
    seed
        Seed of every drawn argument.
    seeds
        Repeat what depends on the numbers with that many seeds: a right backend must pass with all of them.
    json
        Write a record of every check.
    junit
        Write a JUnit XML record.
    workers
        Processes to spread the checks over; 0 for none.
    rows
        Append what was proven to this JSONL file of result rows, for `cs336 matrix`.
    """
    from ..bench.rows import append
    from ..conformance.matrix import proven_rows
    from ..conformance.session import run_conformance

    if not backends:
        raise ValueError("name a backend to judge, such as cs336 conformance torch, or all")
    report = run_conformance(
        backends,
        components=components or (),
        dtypes=dtypes or (),
        audit=audit,
        strict=strict,
        seed=seed,
        seeds=seeds,
        json_path=json,
        workers=workers,
        pytest_arguments=[f"--junitxml={junit}"] if junit else [],
    )
    if rows is not None:
        append(proven_rows(report.record), rows)
    if report.exit_code == 0 and not any(check["outcome"] == "passed" for check in report.record.get("checks", ())):
        print("nothing was judged: what was asked for is not claimed, or can't run here", file=sys.stderr)
        return 1
    return report.exit_code


def mutants(*, components: list[str] | None = None, seed: int = 0) -> int:
    """Judge the kit itself: every wrong backend of a shipped set must be caught, and by which check.

    Parameters
    ----------
    components
        Only the mutants of these components.
    seed
        Seed of every drawn argument.
    """
    import cs336_registry as registry

    from ..conformance.mutation import run_mutants

    for name in components or ():
        registry.contract(name)  # which says where there is none of that name
    return 1 if run_mutants(components, seed=seed) else 0


def matrix(*, results: Path = Path("benchmarks/results")) -> int:
    """Show what each backend claims and what was proven of it, from the committed rows, with its speed.

    Parameters
    ----------
    results
        The folder of JSONL rows.
    """
    from ..bench.rows import some
    from ..conformance.matrix import grid, shortfalls

    found = some(results)
    print(f"{grid(found)}\n\n{shortfalls(found)}")
    return 0
