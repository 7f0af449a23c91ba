"""The grid says what the rows say: proven, failed, claimed, how fast, and why a check was not asked."""

from __future__ import annotations

import pytest

from cs336_registry.conformance.matrix import grid, proven_rows, shortfalls


def check(component: str, outcome: str = "passed", dtype: str = "float32", **more) -> dict:
    name = f"test_case[{component}-{dtype}-{outcome}]"
    common = {"backend": "torch", "component": component, "device": "cpu", "group": "case", "unclaimed": []}
    return common | {"check": name, "outcome": outcome, "dtype": dtype} | more


def rows(*checks: dict) -> list[dict]:
    return proven_rows({"checks": checks, "seed": 0, "seeds": 20, "versions": {"torch": "2"}})


def timed(backend: str, seconds: float, **more) -> dict:
    row = {"benchmark": "component", "component": "silu", "workload": "small", "dtype": "float32", "device": "cpu"}
    return row | {"direction": "both", "backend": backend, "seconds": seconds} | more


def cell(table: str, component: str, backend: str) -> str:
    heads, _, *lines = table.splitlines()
    column = heads.split("|").index(f" {backend} ")
    return next(line for line in lines if line.startswith(f"| {component} ")).split("|")[column].strip()


def test_what_passed_is_counted_with_its_dtypes_and_the_speed_of_the_largest_workload():
    found = rows(check("silu"), check("silu", dtype="bfloat16"), check("silu", "skipped", "float64"))
    assert found[0]["seeds"] == 20 and found[0]["dtypes"] == ["bfloat16", "float32"]
    speeds = [timed("reference", 4.0), timed("torch", 4.0)]
    speeds += [timed("reference", 6.0, workload="large"), timed("torch", 4.0, workload="large")]
    speeds += [timed("torch", 1.0, workload="without the reference")]
    table = grid([*found, *speeds], own=True)
    assert cell(table, "silu", "torch") == "cpu: 2 passed (bf16, fp32), **1.5x**"
    assert cell(table, "softmax", "torch") == "claimed, not proven" and cell(table, "silu", "heap_bpe") == ""


def test_a_failure_hides_what_passed():
    table = grid(rows(check("silu"), check("silu", "failed")), own=True)
    assert cell(table, "silu", "torch") == "cpu: 1 of 2 failed (fp32)"


def test_the_interpreter_is_no_device_to_be_fast_on():
    proven = rows(check("silu", backend="triton", device="interpreter"))
    table = grid([*proven, timed("reference", 1.0), timed("torch", 1.0)], own=True)
    assert cell(table, "silu", "triton") == "interpreter: 1 passed (fp32)"


def test_a_component_that_is_not_provided_has_no_row():
    skipped = check("silu", "skipped")
    del skipped["device"]
    assert rows(skipped) == []


def test_why_a_check_was_not_asked_is_told_once_for_all_components():
    reason = "dtype float64 is not among float32: convert, or choose another backend"
    found = rows(*(check(name, "skipped", "float64", unclaimed=[reason]) for name in ("silu", "rope")))
    found += rows(check("softmax", "failed"))
    table = shortfalls(found, own=True)
    assert "| torch | rope, silu | dtype float64 is not among float32 |" in table
    assert "| torch | softmax | fails test_case[softmax-float32-failed] |" in table


@pytest.mark.parametrize("table", [grid, shortfalls])
def test_a_strangers_backend_is_left_out_of_the_own_table(table, monkeypatch):
    from cs336_registry import registry

    found = registry.backends()
    stranger = next(iter(found.values())).__class__(**{**vars(found["torch"]), "name": "x", "distribution": "cs336-x"})
    monkeypatch.setattr(registry, "backends", lambda: {**found, "x": stranger})
    judged = [row | {"backend": "x"} for row in rows(check("silu", unclaimed=["it does not claim x"]))]
    assert "| x |" not in table(judged, own=True) and "| x |" in table(judged)
