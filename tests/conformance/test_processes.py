"""Several processes at once: who fails is heard, who dies or sleeps does not stop the session."""

from __future__ import annotations

import os
import signal

import pytest

from cs336_registry.conformance import processes
from cs336_registry.conformance.processes import judge_in_processes
from cs336_registry.conformance.trial import Trial

REFERENCE = ("backend", "reference")


@pytest.fixture(autouse=True)
def stopped():
    yield
    processes.stop()


def judge(folder, origin=REFERENCE):
    judge_in_processes("pretoken_counter", None, Trial(folder=folder, origin=origin))


def test_the_same_processes_serve_every_check_and_hash_differently(tmp_path):
    judge(tmp_path)
    first = [worker.process.pid for worker in processes._started]
    judge(tmp_path)
    assert [worker.process.pid for worker in processes._started] == first and len(first) == processes.PROCESSES


def test_a_failure_is_told_and_the_next_check_is_judged(tmp_path):
    with pytest.raises(AssertionError, match=r"2 processes called it at once: UnknownNameError: .*nonesuch"):
        judge(tmp_path, ("backend", "nonesuch"))
    with pytest.raises(AssertionError, match=r"2 processes called it at once: AssertionError: result"):
        judge(tmp_path, ("mutant", "counter_lower_cases"))
    judge(tmp_path)


def test_a_process_that_dies_is_a_failure_and_is_replaced(tmp_path):
    judge(tmp_path)
    processes._started[1].process.kill()
    with pytest.raises(AssertionError, match=r"process 1 ended with code -9"):
        judge(tmp_path)
    judge(tmp_path)


def test_a_process_that_waits_for_ever_is_a_failure(tmp_path, monkeypatch):
    judge(tmp_path)
    os.kill(processes._started[0].process.pid, signal.SIGSTOP)
    monkeypatch.setattr(processes, "SECONDS", 0.2)
    with pytest.raises(AssertionError, match=r"process 0 did not answer within 0.2 s"):
        judge(tmp_path)


def test_without_an_origin_nobody_can_find_the_implementation(tmp_path):
    with pytest.raises(AssertionError, match="give the Trial an origin"):
        judge(tmp_path, None)
