"""The scripts of the GPU round, rehearsed: they must work the first time, on a machine that is lent for minutes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run benchmarks/gpu_round.sh")


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def test_ops_are_judged_and_timed(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ["--rehearse", "--only", "silu", "--backends", "triton", "--label", "trial", "--output", str(out)]
    assert script("triton_ops").main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    timed = {(row["backend"], row["direction"]) for row in rows if "seconds" in row}
    assert timed == {("triton", way) for way in ("forward", "backward", "both")}
    assert all(row["commit"] and row["machine"] and row["versions"]["triton"] for row in rows)
    assert {row["label"] for row in rows} == {"trial"}


def test_what_fails_while_it_is_timed_is_told(tmp_path, monkeypatch):
    ops = script("triton_ops")
    from cs336_registry.bench import measurement

    def fails(call, calls, device):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(ops, "calls_for", lambda call, device: 1)
    monkeypatch.setattr(measurement, "seconds_per_call", fails)
    out = tmp_path / "rows.jsonl"
    arguments = ["--rehearse", "--only", "silu", "--backends", "triton", "--output", str(out)]
    assert ops.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows and all("an illegal memory access" in row["failed"] and "seconds" not in row for row in rows)


def test_a_wrong_contender_is_not_timed(tmp_path, monkeypatch):
    ops = script("triton_ops")
    monkeypatch.setattr(ops, "contenders", lambda component, device: {"wrong": lambda: lambda x: 2 * x})
    out = tmp_path / "rows.jsonl"
    ops.main(["--rehearse", "--only", "silu", "--output", str(out)])
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["backend"] == "wrong" and "result" in row["failed"] and "seconds" not in row


def test_the_optimizers_step_is_judged():
    ops = script("triton_ops")
    entry = next(entry for entry in ops.ENTRIES if entry.component == "adamw")
    for name, factory in ops.OPTIMIZERS.items():
        if name != "torch_fused":
            assert ops.optimizer_verdict(entry, factory, torch.float32, "cpu") == "", name

    def lazy(parameters):
        return lambda: None

    assert "away from PyTorch's" in ops.optimizer_verdict(entry, lazy, torch.float32, "cpu")


def test_tuning_writes_what_the_backend_reads(tmp_path, capsys):
    from cs336_triton import configurations

    tuning = script("triton_tuning")
    arguments = ["--rehearse", "--only", "rmsnorm_backward", "--dtypes", "bfloat16", "--output", str(tmp_path)]
    assert tuning.main(arguments) == 0
    table = json.loads((tmp_path / "sm_90.json").read_text())
    rows = configurations.read_rows(table["rows"])
    assert {kernel for kernel, _, _ in rows} == {"rmsnorm_backward", "add_rmsnorm_backward"} and len(rows) >= 6
    assert all(row["time_over_default"] < 1 for row in table["rows"]), "the last candidate was to win"
    assert tuning.main([*arguments, "--seconds", "-1"]) == 0
    assert "not timed, -1 seconds are over" in capsys.readouterr().out


def test_tuned_embeddings_meet_tokens_as_in_a_text():
    ids = script("triton_tuning").sorted_ids(32768)
    counts = ids.bincount()
    assert torch.equal(ids, ids.sort().values) and ids[0] >= 0 and ids[-1] < 32768
    # Under Zipf's law id 0 takes the share ln 2 / ln 32768 of all.
    assert abs(counts[0] / 32768 - 1 / 15) < 0.01 and (counts == 1).sum() > 2000


def test_tuned_embeddings_find_runs_that_fit_their_places():
    made = script("triton_tuning").embedding_integers
    first, order = made("first_pointer", 1001, 4096), made("order_pointer", 4096, 4096)
    assert first[0] == 0 and (first.diff() >= 0).all() and first[-1] <= 4096 and first.diff().max() > 200
    assert torch.equal(order.sort().values, torch.arange(4096)) and not torch.equal(order, torch.arange(4096))


def test_the_round_runs_its_parts_in_order(tmp_path):
    """With a Python that only says what it was asked; one part fails, and none stops another."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\necho "asked: $*"\n'
        'case "$*" in *training_step*) exit 1 ;; esac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "REHEARSE": "1", "PYTHON": str(python), "OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_round.sh")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    asked = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("asked:")]
    scripts = [f"benchmarks/{name}.py" for name in ("training_step", "triton_ops")]
    assert [name for name in dict.fromkeys(asked) if name in scripts] == scripts
    assert run.returncode == 2 and "2 parts failed" in run.stdout, run.stdout + run.stderr
    run = subprocess.run([*command, "tests:5", "nonsense"], env=environment, capture_output=True, text=True)
    assert run.returncode == 1 and "unknown part 'nonsense' (prepare tests step" in run.stdout
    assert "asked: -m pytest" in run.stdout
