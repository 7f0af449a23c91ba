"""A backend that is the reference behind another name: whatever fails here and not there is dispatch's fault."""

from __future__ import annotations

import pytest

import cs336_registry as registry
from cs336_registry.arguments import ArgumentMaker
from cs336_registry.plugin import Implementation

from .conftest import FakeEntryPoint, backend_module


@pytest.fixture
def loopback(install):
    reference = registry.backends()["reference"].backend
    copies = [Implementation(**vars(implementation)) for implementation in reference.implementations]
    install(FakeEntryPoint("loopback", backend_module("loopback", *copies)))


def test_it_provides_what_the_reference_does(loopback):
    for component in registry.components():
        decision = registry.resolve(component, backend="loopback!")
        parts = [part.backend for part in decision.parts] or [decision.backend]
        assert set(parts) == {"loopback"}


@pytest.mark.parametrize(
    "component", ["rmsnorm", "swiglu", "attention", "cross_entropy", "lr_cosine_schedule", "tokenizer"]
)
def test_every_case_passes_through(loopback, tmp_path, component):
    contract = registry.contract(component)
    through, direct = registry.get(component, backend="loopback!"), registry.get(component)
    for case in contract.cases:
        one, other = (contract.arguments(case, ArgumentMaker(7, folder=tmp_path)) for _ in range(2))
        assert str(contract.run(through, one)) == str(contract.run(direct, other))
