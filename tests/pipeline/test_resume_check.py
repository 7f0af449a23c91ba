"""The check calls a run exact that is, and one that is not, not: two backends here forget something when they go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cs336_registry.cli.resume_check import resume_check as command
from cs336_registry.pipeline import resume_check, training
from cs336_registry.pipeline.errors import RunError
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.run_comparison import compare

from .conftest import TINY

QUIET = Progress(quiet=True)
FORGETFUL = '''
import importlib

from cs336_registry.plugin import Backend, Implementation, hookimpl


@hookimpl
def cs336_backend():
    names = ("get_batch", "load_checkpoint")
    return Backend(
        name="forgetful",
        summary="forgets, after a restart",
        requires=("torch",),
        implementations=tuple(Implementation(component=name, target=f"forgetful:{name}") for name in names),
    )


def get_batch(dataset, batch_size, context_length, device="cpu", *, generator=None):
    """Draws from a generator of its own, whose state nobody saves."""
    global own
    import numpy

    own = globals().get("own") or numpy.random.default_rng(0)
    from cs336_reference.get_batch import get_batch

    return get_batch(dataset, batch_size, context_length, device, generator=own)


def load_checkpoint(src, model, optimizer):
    """Takes over the weights and leaves AdamW's moments at zero."""
    from cs336_reference.load_checkpoint import load_checkpoint

    return load_checkpoint(src, model, None)
'''


@pytest.fixture
def forgetful(tmp_path, monkeypatch) -> None:
    """Installs the backend for the processes that the check starts."""
    folder = tmp_path / "installed"
    (folder / "forgetful-1.0.dist-info").mkdir(parents=True)
    (folder / "forgetful.py").write_text(FORGETFUL)
    (folder / "forgetful-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: forgetful\nVersion: 1.0\n"
    )
    entry_point = "[cs336_registry]\nforgetful = forgetful\n"
    (folder / "forgetful-1.0.dist-info" / "entry_points.txt").write_text(entry_point)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def settings(corpus_path) -> list[str]:
    return [*TINY, f'data.train="{corpus_path}"', "checkpoint.every=6", "evaluation.every=60", "training.steps=120"]


def check(settings, out: Path, *more: str) -> int:
    return command("quickstart", set=[*settings, *more], out=out, kills=2, seed=3, quiet=True, steps=120)


@pytest.mark.slow
def test_killing_at_random_steps_changes_nothing(settings, tmp_path, capsys):
    assert check(settings, tmp_path / "check") == 0
    told = capsys.readouterr().out
    assert told.count("killed behind step") == 2
    assert "compared: 120 step rows, 3 evaluation rows, 3 sample rows" in told
    assert told.splitlines()[-1].startswith(
        "EXACT: losses, weights and optimizer state are those of the undisturbed run"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("component", ["get_batch", "load_checkpoint"])
def test_a_run_that_forgets_is_found_out(settings, tmp_path, capsys, component):
    assert check(settings, tmp_path / "check", f"backend={component}=forgetful") == 1
    told = capsys.readouterr().out
    assert "\nNOT EXACT: " in told and "EXACT: losses" not in told
    kills = [line for line in told.splitlines() if line.startswith("killed behind")]
    first = next(line for line in told.splitlines() if line.startswith("  step "))
    # The first row that differs follows the first checkpoint that was continued from.
    beginnings = sorted(int(line.rpartition(" ")[2]) for line in kills)
    assert int(first.split()[1].rstrip(":")) > min(step for step in beginnings if step)


def test_a_run_that_fails_is_told(settings, tmp_path):
    with pytest.raises(RunError, match=r"the run in .*whole failed: .*there is no file 'nowhere.txt'"):
        check(settings, tmp_path / "check", "data.train=nowhere.txt")


def test_more_kills_than_steps_are_refused(tiny, tmp_path):
    with pytest.raises(RunError, match="12 steps are too few for 10 kills: ask for 13 steps or more"):
        resume_check.check(tiny(), tmp_path, kills=10, seed=0, progress=QUIET)
    with pytest.raises(ValueError, match="--kills is 0: it must be at least 1"):
        command(kills=0)


def test_a_short_run_keeps_the_learning_rates_of_the_whole_one():
    short = resume_check.short("tinystories_17m", 60, ["checkpoint.every=7"])
    assert (short.training.steps, short.cosine_steps, short.schedule.warmup_steps) == (60, 10_000, 250)
    assert (short.checkpoint.every, short.training.device) == (7, "cpu")


def test_one_changed_bit_is_a_difference(tiny, tmp_path):
    training.train(tiny(), tmp_path / "one", progress=QUIET)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    found = compare(tmp_path / "one", tmp_path / "other")
    assert found.equal and found.rows == {"step": 12, "evaluation": 3, "sample": 3}
    path = tmp_path / "other" / "checkpoints" / "step-00000012" / "checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    parameters = sum(tensor.numel() for tensor in saved["model"].values())
    assert found.numbers >= 3 * parameters, "AdamW has two moments for each weight"

    name = "layers.0.attn.q_proj.weight"
    weight = saved["model"][name]
    weight[0, 0] = 0.0
    torch.save(saved, tmp_path / "one" / "checkpoints" / "step-00000012" / "checkpoint.pt")
    weight[0, 0] = -0.0
    torch.save(saved, path)
    (told,) = compare(tmp_path / "one", tmp_path / "other").differences
    assert told == f"model.{name}: 0 of 256 numbers differ (but bits do), by up to 0"
    weight[0, 0] = 1.0
    torch.save(saved, path)
    (told,) = compare(tmp_path / "one", tmp_path / "other").differences
    assert told == f"model.{name}: 1 of 256 numbers differ, by up to 1"

    metrics = tmp_path / "other" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"step": 7,' not in line or '"kind": "step"' not in line))
    assert "step rows: 12 and 11" in compare(tmp_path / "one", tmp_path / "other").differences
    with pytest.raises(RunError, match="has no steps to compare"):
        compare(tmp_path / "nothing", tmp_path / "other")
