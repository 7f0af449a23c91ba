"""The probe: four things may be in the way, and each has its own sentence and its own cure."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from cs336_triton.availability import probe

from cs336_registry.machine import CudaDevice, Machine

HOPPER = CudaDevice("NVIDIA H200", (9, 0), 141 << 30)
VOLTA = CudaDevice("Tesla V100", (7, 0), 16 << 30)


def machine(*devices: CudaDevice, interpreter: bool = False) -> Machine:
    return Machine(python="3.11", system="Linux", cpu_count=2, cuda_devices=devices, triton_interpreter=interpreter)


@pytest.mark.parametrize(
    "capable",
    [machine(HOPPER), machine(VOLTA, HOPPER), machine(interpreter=True)],
    ids=["card", "one_of_two_cards", "interpreter"],
)
def test_kernels_can_run(capable):
    assert probe(capable) is None


@pytest.mark.parametrize(
    ("found", "problem", "cure"),
    [
        (machine(), "no CUDA device is visible", "set TRITON_INTERPRET=1 before Python starts"),
        (machine(VOLTA), "Tesla V100 has compute capability 7.0", "the backend torch"),
        (machine(HOPPER, interpreter=True), "although NVIDIA H200 is visible", "unset it to use the card"),
    ],
    ids=["no_card", "old_card", "interpreter_beside_a_card"],
)
def test_what_is_in_the_way_and_what_cures_it(found, problem, cure):
    sentence = probe(found)
    assert sentence is not None and problem in sentence and cure in sentence and "\n" not in sentence


@pytest.mark.parametrize("found", [machine(), machine(HOPPER), machine(interpreter=True)], ids=str)
def test_without_triton_nothing_else_matters(monkeypatch, found):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert str(probe(found)).startswith("triton is not installed: `pip install triton`")


def test_the_registry_says_it_without_importing_a_framework():
    """`cs336 backends` lists the backend as unavailable, with the sentence, on a machine without a card."""
    script = """
import sys
import cs336_registry as registry
status = registry.backends()["triton"]
assert status.state == "unavailable" and "no CUDA device is visible" in status.reason, status
assert not {"torch", "triton"} & set(sys.modules), "a framework was imported"
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
