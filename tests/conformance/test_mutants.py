"""Every mutant is caught, for its bug; what is right is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cs336_registry import registry
from cs336_registry.conformance.checks import checks
from cs336_registry.conformance.mutants import AREAS, mutants
from cs336_registry.conformance.mutation import judge_mutant
from cs336_registry.conformance.subject import find
from cs336_registry.machine import detect

MUTANTS = {f"{mutant.component}-{mutant.name}": mutant for mutant in mutants()}
SEEDS = range(1, 1 + int(os.environ.get("CONFORMANCE_SEEDS", "1")))
"""CONFORMANCE_SEEDS=20 repeats the search for false alarms with twenty seeds."""


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_mutant_is_caught(name):
    verdict = judge_mutant(MUTANTS[name])
    assert verdict.caught_by is not None, f"{name} survived: {MUTANTS[name].bug}"


def test_there_are_mutants_of_every_area():
    assert len(MUTANTS) >= 60
    broken = {mutant.component for mutant in MUTANTS.values()}
    assert broken == {component for components in AREAS.values() for component in components}


def correct():
    for backend in ("reference", "torch"):
        for component in registry.components():
            if find(backend, component).claims is not None:
                yield backend, component


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("backend", "component"), sorted(correct()))
def test_no_false_alarm(backend, component, seed, tmp_path):
    """Seed 0 is what the suite itself runs; other numbers must not change the verdict."""
    subject = find(backend, component)
    implementation, trial = subject.load(), subject.trial(tmp_path, seed)
    for check in checks(registry.contract(component)):
        if not check.unclaimed(subject.claims, detect(), subject.device):
            check.run(implementation, subject.claims, trial)


def test_text_mutants_load_no_torch():
    code = (
        "import sys; from cs336_registry.conformance.mutants import mutants; "
        "from cs336_registry.conformance.mutation import judge_mutant; "
        "verdict = judge_mutant(mutants(['bpe_trainer'])[0]); "
        "print(verdict.caught_by, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    caught_by, loaded = done.stdout.split()
    assert caught_by.startswith("case[bpe_trainer") and loaded == "False"
