"""Sweeps: what is varied, what is trained once only, what counts as diverged."""

from __future__ import annotations

import json
import re
import signal

import pytest
import torch

from cs336_registry.cli.sweep import sweep as command
from cs336_registry.errors import ConfigurationError
from cs336_registry.pipeline import training
from cs336_registry.pipeline.configuration import load
from cs336_registry.pipeline.divergence import ABOVE_BEST, ABOVE_START, WINDOW, DivergenceWatch
from cs336_registry.pipeline.errors import DivergedError, MismatchError
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.model_costs import parameters
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.sweep import sweep
from cs336_registry.pipeline.variations import variations

from .conftest import TINY
from .test_training import StopsAt, losses

QUIET = Progress(quiet=True)


@pytest.fixture
def settings(corpus_path) -> list[str]:
    return [*TINY, f'data.train="{corpus_path}"', "data.validation_fraction=0.2"]


def watched(*found: float) -> int | None:
    """The step at which a run with these losses is given up."""
    watch = DivergenceWatch()
    for step, loss in enumerate(found, start=1):
        try:
            watch({"kind": "step", "step": step, "loss": loss})
        except DivergedError:
            return step
    return None


def test_a_loss_above_the_start_or_far_above_the_best_is_a_divergence():
    above = 5 + ABOVE_START + 0.01
    assert watched(5, *[5] * 20, *[above] * 20) == 21 + WINDOW // 2 + 1
    assert watched(5, *[1] * 20, *[1 + ABOVE_BEST + 0.01] * 20) == 21 + WINDOW // 2 + 1
    assert watched(5, *[5] * 20, *[5 + ABOVE_START - 0.01] * 50) is None
    assert watched(5, *[1] * 20, *[1 + ABOVE_BEST - 0.01] * 50) is None


def test_a_spike_is_no_divergence():
    assert watched(5, *[1] * 20, *[99] * (WINDOW // 2 - 1), *[1] * 20) is None


def test_what_was_lost_with_a_killed_process_does_not_count():
    rows = [{"kind": "step", "step": step, "loss": 5.0 if step < 20 else 1.0} for step in range(1, 40)]
    later = [{"kind": "step", "step": step, "loss": 3.5} for step in range(20, 60)]
    watch = DivergenceWatch(rows)
    watch({"kind": "resume", "step": 19})
    for row in later:
        watch(row)
    watch = DivergenceWatch(rows)
    with pytest.raises(
        DivergedError, match=r"diverged at step \d+: the loss stands at 3.50, 2.50 above the best before"
    ):
        for row in later:
            watch(row)


def test_every_combination_is_a_run():
    found = variations("quickstart", ["optimizer.lr=1e-4,1e-3", "model.norm=rms,none,post"], [])
    assert [one.name for one in found][:4] == [
        "lr=0.0001_norm=rms",
        "lr=0.0001_norm=none",
        "lr=0.0001_norm=post",
        "lr=0.001_norm=rms",
    ]
    assert len(found) == 6 and found[-1].settings == ["optimizer.lr=0.001", "model.norm=post"]


@pytest.mark.parametrize(
    ("vary", "told"),
    [
        ([], "nothing is varied: pass --vary"),
        (["optimizer.lr"], r"can't read --vary 'optimizer.lr': write section.key=value,value"),
        (["optimizer.lr=1e-3"], "needs two values or more"),
        (["optimizer.lr=1e-3,"], "needs two values or more"),
        (["optimizer.rl=1e-3,1e-4"], r"unknown key 'optimizer.rl': known: betas, eps, lr"),
        (["model.norm=rms,pots"], r"model.norm = 'pots': did you mean 'post'"),
        (["optimizer.lr=1,2", "optimizer.lr=3,4"], "a key is varied twice"),
        (["optimizer.lr=1e-3,0.001"], "two variations have one name"),
    ],
)
def test_what_can_not_be_varied_is_refused_before_anything_is_trained(vary, told, tmp_path):
    with pytest.raises(ConfigurationError, match=told):
        sweep("quickstart", vary, tmp_path, progress=QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("d_ff", [1344, 352, 33])
@pytest.mark.parametrize(("before", "after"), [("swiglu", "silu"), ("silu", "swiglu")])
def test_feed_forward_networks_are_compared_at_equal_size(d_ff, before, after):
    """Counted on built models."""
    import cs336_registry as registry
    from cs336_registry.pipeline.model import build

    settings = [f"model.ffn={before}", f"model.d_ff={d_ff}", "model.num_layers=2", "model.d_model=64"]
    counts = []
    for one in variations("quickstart", [f"model.ffn={before},{after}"], settings):
        configuration = load("quickstart", [*settings, *one.settings])
        model = build(configuration, registry.get("transformer_lm"), "cpu")
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
        assert counts[-1] == sum(parameters(configuration.model).values())
    margin = 2 * 64 * (1 if after == "silu" else 1.5)
    assert abs(counts[0] - counts[1]) <= margin
    if d_ff == 1344:
        assert counts[0] == counts[1]


def test_a_batch_size_can_be_varied_at_equal_tokens():
    found = variations("quickstart", ["training.batch_size=4,16,64"], [], same_tokens=True)
    configurations = [load("quickstart", one.settings) for one in found]
    assert {one.training.steps * one.training.batch_size for one in configurations} == {500 * 16}
    assert [one.schedule.warmup_steps for one in configurations] == [100, 25, 6]


def test_a_sweep_marks_what_diverges_and_trains_everything_once(settings, tmp_path, capsys):
    vary = ["optimizer.lr=1e-3,1e-2,1e38"]
    settings = [*settings, "schedule.warmup_steps=0", "checkpoint.every=3"]
    # The second run is stopped on its way, as by a kill.
    with pytest.raises(KeyboardInterrupt):
        sweep(
            "quickstart", ["optimizer.lr=1e-2,1e-3"], tmp_path, settings=settings, progress=StopsAt(8, signal.SIGTERM)
        )
    before = losses(tmp_path / "lr=0.01")
    results = sweep("quickstart", vary, tmp_path, settings=settings, progress=QUIET)
    assert [result.variation.name for result in results][-1] == "lr=1e+38"
    assert results[0].loss <= results[1].loss and results[2].loss is None
    assert re.match(r"diverged at step \d+: loss .*(nan|inf)", results[2].diverged)
    assert losses(tmp_path / "lr=0.01")[:8] == before[:8] and len(losses(tmp_path / "lr=0.01")) == 12
    told = json.loads((tmp_path / "sweep.json").read_text())
    assert [run["diverged"] is None for run in told["runs"]] == [True, True, False]
    page = (tmp_path / "report.html").read_text()
    assert "lr=1e+38 diverged at step" in page and page.count('class="swatch') == 3

    # Again, nothing is trained.
    metrics = {path: path.read_bytes() for path in tmp_path.glob("*/metrics.jsonl")}
    words = {"vary": vary, "set": settings, "out": tmp_path, "quiet": True}
    capsys.readouterr()
    assert command("quickstart", **words) == 0
    assert {path: path.read_bytes() for path in tmp_path.glob("*/metrics.jsonl")} == metrics
    printed = capsys.readouterr().out
    assert "validation loss" in printed and "diverged" in printed and "lr=1e+38: diverged at step" in printed

    with pytest.raises(MismatchError, match=r"optimizer.weight_decay was 0.1, is now 0.2.*choose another --out"):
        sweep("quickstart", vary, tmp_path, settings=[*settings, "optimizer.weight_decay=0.2"], progress=QUIET)


def test_a_run_is_given_up_while_its_loss_is_a_number(settings, tmp_path, monkeypatch):
    from cs336_registry.pipeline import divergence

    monkeypatch.setattr(divergence, "WINDOW", 2)
    monkeypatch.setattr(divergence, "ABOVE_START", -0.5)
    settings = [*settings, "checkpoint.every=1"]
    results = sweep("quickstart", ["optimizer.lr=1e-3,2e-3"], tmp_path, settings=settings, progress=QUIET)
    rows = read_metrics(tmp_path / "lr=0.001" / "metrics.jsonl")
    assert [row["step"] for row in of_kind(rows, "divergence")] == [2]
    assert all("diverged at step 2: the loss stands at" in result.diverged for result in results)


def test_ablations_share_data_and_differ_in_the_model_alone(settings, tmp_path):
    settings = [*settings, "training.steps=2", "schedule.warmup_steps=1", "evaluation.sample_tokens=0"]
    results = sweep("quickstart", ["model.norm=rms,none,post"], tmp_path, settings=settings, progress=QUIET)
    assert (tmp_path / "data" / "train.npy").is_file() and not list(tmp_path.glob("norm=*/data"))
    counts = {one.variation.name: one.run.of("accounting")["parameters"] for one in results}
    # Three norms of d_model = 16: two in the block and the last one.
    assert counts["norm=rms"] == counts["norm=post"] == counts["norm=none"] + 3 * 16


def test_a_varied_vocabulary_has_a_tokenizer_of_its_own(settings, tmp_path):
    settings = [*settings, "training.steps=2", "schedule.warmup_steps=1", "evaluation.sample_tokens=0"]
    sweep("quickstart", ["model.vocab_size=270,280"], tmp_path, settings=settings, progress=QUIET)
    for size in (270, 280):
        metadata = json.loads((tmp_path / "data" / f"model.vocab_size={size}/tokenizer/metadata.json").read_text())
        assert metadata["vocab_size"] == size


def test_a_watcher_ends_a_run_whose_rows_are_kept(tiny, tmp_path):
    def ends_at_seven(row):
        if row["kind"] == "step" and row["step"] == 7:
            raise DivergedError("enough")

    with pytest.raises(DivergedError, match="enough"):
        training.train(tiny(), tmp_path, progress=QUIET, watchers=[ends_at_seven])
    assert len(losses(tmp_path)) == 7 and torch.isfinite(torch.tensor(losses(tmp_path))).all()
