"""Plugins made up on the spot: modules that exist in this process only, behind real entry points."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest

import cs336_registry as registry
from cs336_registry.machine import CudaDevice, Machine
from cs336_registry.plugin import Backend, Implementation, hookimpl

PLAIN = Machine(python="3.11", system="Linux", cpu_count=2, cuda_problem="no NVIDIA driver is installed")
GPU = Machine(python="3.11", system="Linux", cpu_count=2, cuda_devices=(CudaDevice("H200", (9, 0), 2**37),))


@dataclass
class FakeEntryPoint:
    """An entry point whose module is made up; `found` is the module, or the exception its import raises."""

    name: str
    found: object
    value: str = "made_up"
    distribution: str = ""

    @property
    def dist(self):
        return SimpleNamespace(name=self.distribution, version="1.0") if self.distribution else None

    def load(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def module_with(**attributes) -> ModuleType:
    module = ModuleType("made_up")
    vars(module).update(attributes)
    return module


def backend_module(name: str, *implementations: Implementation, probe: str | None = None, **manifest) -> ModuleType:
    """A plugin module that provides backend `name`."""

    @hookimpl
    def cs336_backend() -> Backend:
        return Backend(name=name, summary="made up", implementations=implementations, **manifest)

    @hookimpl
    def cs336_probe(machine: Machine) -> str | None:
        return probe

    return module_with(cs336_backend=cs336_backend, cs336_probe=cs336_probe)


@pytest.fixture
def install(monkeypatch):
    """`install(entry_point, ...)` makes the registry find these besides the real plugins."""
    real = importlib.metadata.entry_points

    def installed(*entries: FakeEntryPoint) -> None:
        def entry_points(**selection):
            return [*real(**selection), *entries] if selection.get("group") == "cs336_registry" else real(**selection)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        registry.refresh()

    yield installed
    monkeypatch.undo()
    registry.refresh()


@pytest.fixture
def made_up_module(monkeypatch):
    """A module importable under the name `made_up_backend` that holds the given attributes."""

    def make(**attributes) -> str:
        module = ModuleType("made_up_backend")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, "made_up_backend", module)
        return "made_up_backend"

    return make


@pytest.fixture(autouse=True)
def clean_layers(monkeypatch, tmp_path):
    """No test sees the developer's own choice of backend, and none leaves one behind."""
    monkeypatch.delenv("CS336_BACKEND", raising=False)
    monkeypatch.delenv("CS336_BLOCK", raising=False)
    monkeypatch.chdir(tmp_path)
    before = registry.registry._command_line
    registry.set_command_line(None)
    registry.refresh()
    yield
    registry.refresh()
    registry.registry._command_line = before
