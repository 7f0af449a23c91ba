"""Running the mutants: which check catches each, and which are not caught."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import registry
from ..component import Component
from ..machine import detect
from ..plugin import Implementation
from .checks import Check, checks
from .mutants import TEXTBOOK, Mutant, mutants, textbook
from .trial import Trial

UNRELATED = ("signature", "error", "threads", "processes")
"""Groups that judge a mutant only where it says so: it is to be caught for its bug."""


@dataclass(frozen=True)
class Verdict:
    """`caught_by` is the check that failed, as `group[id]`, None where the mutant survived; `message` what it said."""

    mutant: Mutant
    caught_by: str | None
    message: str = ""


def judge_mutant(mutant: Mutant, *, seed: int = 0) -> Verdict:
    """Run the contract's checks on `mutant` until one fails that the textbook passes."""
    contract = registry.contract(mutant.component)
    claims = all_claims(contract)
    implementation = mutant.build()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(folder=Path(folder), seed=seed, origin=("mutant", mutant.name))
        for check in _order(contract, mutant):
            failure = _failure(check, implementation, claims, trial)
            if failure is None:
                continue
            if not isinstance(failure, AssertionError) and not mutant.raises:
                raise RuntimeError(
                    f"mutant {mutant.name} crashed in {check}: it must be wrong, not broken"
                ) from failure
            right, of_textbook = textbook(mutant.component), replace(trial, origin=("backend", TEXTBOOK))
            if check.group not in ("error", "signature") and _failure(check, right, claims, of_textbook) is not None:
                raise RuntimeError(f"{check} fails the textbook too: it proves nothing about mutant {mutant.name}")
            return Verdict(mutant, str(check), f"{failure}".partition("\n")[0])
    return Verdict(mutant, None)


def judge_mutants(components: Sequence[str] | None = None, *, seed: int = 0) -> list[Verdict]:
    """The verdict on every mutant of `components` (default: of all)."""
    return [judge_mutant(mutant, seed=seed) for mutant in mutants(components)]


def run_mutants(components: Sequence[str] | None = None, *, seed: int = 0) -> int:
    """Print a table of the mutants and what caught each; the number of survivors, which should be 0."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console()
    table = Table("component", "mutant", "bug", "caught by", title="Mutants", title_justify="left")
    survivors = 0
    found = mutants(components)
    for mutant in track(found, description="Judging mutants", console=console, transient=True):
        verdict = judge_mutant(mutant, seed=seed)
        survivors += verdict.caught_by is None
        table.add_row(mutant.component, mutant.name, mutant.bug, verdict.caught_by or "[bold red]SURVIVED[/]")
    console.print(table)
    console.print(
        f"{len(found) - survivors} of {len(found)} mutants caught" + (f", {survivors} survived" if survivors else "")
    )
    return survivors


def _order(contract: Component, mutant: Mutant) -> list[Check]:
    """The checks that may catch it, those in the contract's first dtype before the others: most bugs show there."""
    asked = [
        check
        for check in checks(contract)
        if (check.group in mutant.groups if mutant.groups else check.group not in UNRELATED)
        and not check.unclaimed(all_claims(contract), detect())
    ]
    return sorted(asked, key=lambda check: check.dtype not in (None, *contract.dtypes[:1]))


def all_claims(contract: Component) -> Implementation:
    """Everything that the contract speaks about: a mutant gets no excuse."""
    features = {
        feature for subject in (*contract.cases, *contract.laws, *contract.error_cases) for feature in subject.features
    }
    return Implementation(
        component=contract.name,
        target="mutant:mutant",
        dtypes=contract.dtypes,
        gradient=bool(contract.differentiable),
        deterministic=True,
        thread_safe=True,
        process_safe=True,
        features=tuple(sorted({*contract.features, *features})),
    )


def _failure(
    check: Check, implementation: Callable[..., Any], claims: Implementation, trial: Trial
) -> Exception | None:
    try:
        check.run(implementation, claims, trial)
    except Exception as error:
        # Any exception is a failure of the implementation: the caller decides whether it counts as caught.
        return error
    return None
