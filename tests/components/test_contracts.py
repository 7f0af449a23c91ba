"""What every contract must have, whoever writes it."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError

import pytest

import cs336_registry as registry
from cs336_registry import adapters
from cs336_registry.arguments import ArgumentMaker
from cs336_registry.component import Component
from cs336_registry.components import NAMES

EVERY = pytest.mark.parametrize("name", sorted(NAMES))


@EVERY
def test_it_can_be_judged_and_timed(name):
    contract = registry.contract(name)
    assert contract.name == name
    assert contract.cases and contract.laws and contract.workloads, "a contract needs cases, laws and workloads"
    assert contract.oracle is not None, "somebody outside our backends must say what is right"
    assert contract.summary and contract.formula and contract.paper
    for group in (contract.cases, contract.error_cases, contract.laws, contract.workloads):
        ids = [one.id for one in group]
        assert len(set(ids)) == len(ids), f"two of {ids} have one id"
    assert all(tolerance.reason for tolerance in (contract.tolerance, contract.gradient_tolerance))


@EVERY
def test_its_docstring_teaches(name):
    text = inspect.getdoc(registry.contract(name).signature) or ""
    assert len(text.splitlines()) >= 3
    assert "Raises" in text or "refuse" in text.lower() or not registry.contract(name).error_cases
    assert "Source" in text or "http" in text


@EVERY
def test_its_adapter_exists(name):
    adapter = registry.contract(name).adapter
    if adapter:
        assert adapter in adapters.__all__
        assert callable(getattr(adapters, adapter))


@EVERY
def test_features_that_cases_need_are_declared(name):
    contract = registry.contract(name)
    needed = {f for one in (*contract.cases, *contract.laws, *contract.error_cases) for f in one.features}
    assert needed <= set(contract.features)


@EVERY
def test_names_of_arguments_are_parameters(name, tmp_path):
    contract = registry.contract(name)
    if contract.observe is not None:
        pytest.skip("its observe function takes what it needs beside the parameters")
    for case in contract.cases:
        assert set(contract.arguments(case, ArgumentMaker(folder=tmp_path))) <= set(contract.parameters)
    assert {*contract.differentiable, *contract.mutates} <= set(contract.parameters)


@EVERY
def test_every_part_of_a_composite_is_a_component(name):
    assert set(registry.contract(name).composed_of) <= set(NAMES)


def test_the_reference_provides_everything_that_is_not_composed():
    manifest = registry.backends()["reference"].backend
    composed = {name for name in NAMES if registry.contract(name).composed_of}
    assert {one.component for one in manifest.implementations} == set(NAMES) - composed


def test_a_contract_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        registry.contract("rmsnorm").exact = True
    assert isinstance(registry.contract("rmsnorm"), Component)
