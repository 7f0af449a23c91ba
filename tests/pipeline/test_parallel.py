"""Training on two processes: the same run as on one, saved by any number of processes and continued by any other."""

from __future__ import annotations

import math
import os
import pickle
import re
import resource
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from cs336_registry.errors import ConfigurationError, RegistryError
from cs336_registry.pipeline import process_group, trained, training
from cs336_registry.pipeline.configuration import from_dict
from cs336_registry.pipeline.errors import MismatchError, RunError
from cs336_registry.pipeline.evaluation import evaluate
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.run_folder import RunFolder
from cs336_registry.ranks import run_on_ranks

STRATEGIES = {
    "ddp": [],
    "ddp_of_torch": ["backend=ddp=torch"],
    "sharded_optimizer": ["parallel.shard_optimizer=true"],
    "sharded_optimizer_of_torch": ["parallel.shard_optimizer=true", "backend=sharded_optimizer=torch"],
    "fsdp": ["parallel.strategy=fsdp"],
    "fsdp_of_torch": ["parallel.strategy=fsdp", "backend=fsdp=torch"],
}
HALFWAY = ["training.steps=8", "schedule.cosine_steps=12"]

TOLERANCE = 12 * 4e-3 * math.sqrt(64 * 2**-24)
"""Both sum the same numbers, in another order. A gradient is a sum over batch · context = 64 tokens and errs by at most
ε = 64 · 2^-24 of the typical size σ of its entries. AdamW divides by an entry's own size, so a step errs there by about
lr · min(1, εσ/|g|), whose root mean square over entries spread about σ is lr · √ε. The loss, whose gradient has a norm
of about one, moves by as much, in each of 12 steps at a learning rate of at most 4e-3. (9e-5; seen: 1e-6.)
"""


def alone(configuration, out):
    return training.train(configuration, out, progress=Progress(quiet=True))


def together(configuration, out):
    return run_on_ranks(train_on_rank, configuration.to_dict(), str(out))


def train_on_rank(rank, content, out):
    return training.train(from_dict(content), Path(out), progress=Progress(quiet=True))


def refusal_together(configuration, out, rank_function=None):
    """The one thing that all processes say; they live on, as starting others would take seconds."""
    words = run_on_ranks(refusal_on_rank, rank_function or train_on_rank, configuration.to_dict(), str(out))
    assert words[0] == words[1]
    return words[0]


def refusal_on_rank(rank, function, content, out):
    try:
        function(rank, content, out)
    except (RegistryError, OSError) as error:
        return str(error)


def rows_of(out, kind="step"):
    return of_kind(read_metrics(out / "metrics.jsonl"), kind)


def losses(out):
    return [row["loss"] for row in rows_of(out)]


def weights(out):
    return trained.weights(trained.load(out).model)


def assert_same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


def assert_nearly_same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < TOLERANCE for name in first)


@pytest.fixture(scope="module")
def undivided(tiny, tmp_path_factory):
    """The run that others are held against."""
    out = tmp_path_factory.mktemp("undivided") / "run"
    alone(tiny(), out)
    return out


@pytest.fixture(scope="module")
def cut_off(tiny, tmp_path_factory):
    """The first steps of it."""
    out = tmp_path_factory.mktemp("cut_off") / "run"
    alone(tiny(*HALFWAY), out)
    return out


@pytest.fixture(scope="module")
def accumulated(tiny, tmp_path_factory):
    """A run of two parts a step, without clipping."""
    out = tmp_path_factory.mktemp("accumulated") / "run"
    alone(tiny("training.gradient_accumulation=2", "optimizer.max_gradient_norm=none"), out)
    return out


@pytest.fixture(scope="module", params=STRATEGIES.values(), ids=STRATEGIES.keys())
def strategy(request):
    return request.param


@pytest.fixture(scope="module")
def divided(tiny, strategy, tmp_path_factory):
    """The run on two processes."""
    out = tmp_path_factory.mktemp("divided") / "run"
    return out, together(tiny(*strategy), out)


def test_two_processes_train_as_one_does(divided, undivided, strategy):
    out, summaries = divided
    np.testing.assert_allclose(losses(out), losses(undivided), rtol=0, atol=TOLERANCE)
    assert summaries[0].evaluation == summaries[1].evaluation and summaries[0].samples == summaries[1].samples
    for found, expected in zip(rows_of(out, "evaluation"), rows_of(undivided, "evaluation"), strict=True):
        assert (found["step"], found["tokens"]) == (expected["step"], expected["tokens"])
        assert found["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)
    assert_nearly_same_weights(out, undivided)
    record = RunFolder(out).record()
    assert (
        record["processes"] == 2 and ("fsdp" if "parallel.strategy=fsdp" in strategy else "ddp") in record["decisions"]
    )


def test_two_processes_are_one_that_accumulates_two_parts_bit_for_bit(tiny, accumulated, strategy, tmp_path):
    """Halving is exact and a sum of two has one order: (g0 + g1) / 2 = g0/2 + g1/2.

    Without clipping: FSDP sums the norm in parts.
    """
    together(tiny(*strategy, "optimizer.max_gradient_norm=none"), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(accumulated)
    assert_same_weights(tmp_path / "run", accumulated)


def test_what_two_processes_saved_continues_exactly_on_two_and_nearly_on_one(
    tiny, divided, undivided, strategy, tmp_path
):
    together(tiny(*strategy, *HALFWAY), tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    together(tiny(*strategy), tmp_path / "two")
    assert losses(tmp_path / "two") == losses(divided[0])
    assert_same_weights(tmp_path / "two", divided[0])
    alone(tiny(*strategy), tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(undivided), rtol=0, atol=TOLERANCE)


def test_what_one_process_saved_continues_on_two(tiny, cut_off, undivided, strategy, tmp_path):
    shutil.copytree(cut_off, tmp_path / "run")
    together(tiny(*strategy), tmp_path / "run")
    assert [row["processes"] for row in rows_of(tmp_path / "run", "resume")] == [1, 2]
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(undivided), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        ["training.gradient_accumulation=2", *STRATEGIES["ddp_of_torch"]],
        ["training.gradient_accumulation=2", *STRATEGIES["fsdp"]],
        ["training.activation_checkpointing=true", *STRATEGIES["fsdp"]],
        ["training.activation_checkpointing=true", *STRATEGIES["fsdp_of_torch"]],
        ["model.tie_embeddings=true", *STRATEGIES["fsdp"]],
        ["model.tie_embeddings=true", *STRATEGIES["fsdp_of_torch"]],
    ],
    ids=" ".join,
)
def test_ways_of_computing_agree(tiny, tmp_path, settings):
    alone(tiny(*settings), tmp_path / "alone")
    together(tiny(*settings), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=0, atol=TOLERANCE)
    assert_nearly_same_weights(tmp_path / "run", tmp_path / "alone")


def test_strategies_may_change_between_two_starts(tiny, tmp_path):
    """With rows that can't be divided evenly."""
    sizes = ["model.vocab_size=281", "model.d_ff=33"]
    alone(tiny(*sizes), tmp_path / "alone")
    for steps, settings in ((4, "fsdp"), (6, "sharded_optimizer"), (8, "fsdp_of_torch"), (10, "ddp"), (12, "fsdp")):
        limits = [f"training.steps={steps}", "schedule.cosine_steps=12"]
        together(tiny(*sizes, *STRATEGIES[settings], *limits), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "alone"), rtol=0, atol=TOLERANCE)


def test_shards_hold_every_row_once(tiny, tmp_path):
    together(tiny(*STRATEGIES["fsdp"]), tmp_path / "run")
    files = sorted((tmp_path / "run" / "checkpoints" / "step-00000012" / "shards").iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 2
    stored = {}
    for file in files:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 (no mapping)
                stored.setdefault(name, []).append(content.get_tensor(name))
    for name, tensor in weights(tmp_path / "run").items():
        assert torch.equal(torch.cat(stored[f"model.{name}"]), tensor)
        moments = stored[f"optimizer.{name}.exp_avg"]
        assert sum(map(len, moments)) == len(tensor) and len(moments) == (1 if tensor.ndim == 1 else 2)
        assert [int(count) for count in stored[f"optimizer.{name}.step"]] == [12]


def stopped_on_rank(rank, content, out, signalled, number):
    """The steps that are saved after one rank alone was told to stop behind step 7."""
    step = training.Trainer._train_step

    def watched(trainer):
        step(trainer)
        if rank == signalled and trainer.step == 7:
            os.kill(os.getpid(), number)

    training.Trainer._train_step = watched
    try:
        training.train(from_dict(content), Path(out), progress=Progress(quiet=True))
    except KeyboardInterrupt:
        return sorted(path.name for path in (Path(out) / "checkpoints").iterdir())
    finally:
        training.Trainer._train_step = step


@pytest.mark.parametrize(("signalled", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(tiny, tmp_path, signalled, number):
    configuration = tiny(*STRATEGIES["fsdp"])
    found = run_on_ranks(stopped_on_rank, configuration.to_dict(), str(tmp_path / "run"), signalled, number)
    assert found == [["step-00000005", "step-00000007"]] * 2
    together(configuration, tmp_path / "run")
    together(configuration, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def evaluate_on_rank(rank, sequences):
    def forward(inputs):
        return torch.nn.functional.one_hot(inputs * 5 % 7, 7).float()

    def cross_entropy(logits, targets, reduction):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction).view(
            targets.shape
        )

    ids = np.random.default_rng(0).integers(0, 7, 100).astype(np.uint16)
    settings = {"context_length": 10, "sequences": sequences, "batch_size": 2, "device": "cpu"}
    return evaluate(forward, ids, list(range(7)), cross_entropy, group=process_group.current(), **settings)


@pytest.mark.parametrize("sequences", [1, 4, 5, 9])
def test_evaluation_covers_every_window_once(sequences):
    expected = evaluate_on_rank(0, sequences)
    for found in run_on_ranks(evaluate_on_rank, sequences):
        assert (found.tokens, found.loss) == (expected.tokens, pytest.approx(expected.loss, rel=1e-12))
        assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["training.batch_size=3"], r"^training.batch_size = 3 can't be divided among 2 processes: set it to"),
        (["training.gradient_accumulation=4"], r"2 processes and gradient_accumulation = 4: set it to a multiple of 8"),
        (
            ["parallel.strategy=fsdp", "backend=fsdp=triton"],
            r"^'triton' was demanded for 'fsdp' .* it does not provide fsdp",
        ),
        (["data.train=nowhere.txt"], r"^there is no file 'nowhere\.txt'"),
    ],
)
def test_what_cannot_start_is_refused_by_all_in_the_same_words(tiny, tmp_path, settings, words):
    found = refusal_together(tiny(*settings), tmp_path / "run")
    assert re.search(words, found), found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["parallel.strategy=fsdp", "parallel.shard_optimizer=true"], r"belongs to strategy = \"ddp\": .*leave it out"),
        (["parallel.strategy=tensor"], r"parallel\.strategy = 'tensor': known: ddp, fsdp"),
        (["parallel.timeout=inf"], r"parallel: timeout = inf: it must be a finite number"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, settings, words):
    with pytest.raises(ConfigurationError, match=words):
        tiny(*settings)


def test_another_configuration_is_refused_by_all(tiny, tmp_path):
    together(tiny("training.steps=2", "schedule.warmup_steps=1"), tmp_path / "run")
    changed = tiny("training.steps=2", "schedule.warmup_steps=1", "optimizer.lr=1")
    assert re.search(
        r"another configuration .*optimizer\.lr was 0\.004, is now 1\.0", refusal_together(changed, tmp_path / "run")
    )


def test_damaged_shards_are_refused_and_pickles_beside_them_are_not_read(tiny, tmp_path):
    configuration = tiny(*STRATEGIES["fsdp"], *HALFWAY)
    together(configuration, tmp_path / "run")
    shards = tmp_path / "run" / "checkpoints" / "step-00000008" / "shards"
    (shards / ".metadata").write_bytes(pickle.dumps(Explodes()))
    alone(configuration, tmp_path / "run")
    last = max(shards.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-100])
    words = r"shards can't be loaded .*: delete .*step-00000008 to continue from an earlier"
    assert re.search(words, refusal_together(tiny(), tmp_path / "run"))
    with pytest.raises(MismatchError, match=words):
        alone(tiny(), tmp_path / "run")
    last.unlink()
    with pytest.raises(MismatchError, match=words):
        alone(tiny(), tmp_path / "run")


class Explodes:
    def __reduce__(self):
        return exec, ("raise AssertionError('a pickle was read')",)


def train_with_full_disk(rank, content, out):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        return train_on_rank(rank, content, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing_that_was_saved(tiny, tmp_path):
    configuration = tiny(*STRATEGIES["fsdp"])
    together(tiny(*STRATEGIES["fsdp"], *HALFWAY), tmp_path / "run")
    found = refusal_together(configuration, tmp_path / "run", train_with_full_disk)
    assert re.search(r"step 10 can't be written .*File too large.* Step 8 is kept: make room", found), found
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000008"]
    together(configuration, tmp_path / "run")
    together(configuration, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def waits_in_vain(rank):
    dist.barrier()
    impatient = dist.new_group(timeout=timedelta(seconds=4))  # enough for processes that come to it one after the other
    try:
        with process_group.current().in_contact(lambda: "step 5 is kept"):
            if rank == 0:
                dist.all_reduce(torch.zeros(1), group=impatient)
            else:
                time.sleep(6)
    except RunError as error:
        return str(error)


def test_waiting_for_a_silent_process_ends(tmp_path):
    said, _ = run_on_ranks(waits_in_vain)
    assert re.search(
        r"rank 0 of 2 lost the other processes \(.+\): one of them .*; step 5 is kept\. Run the same", said
    )


def test_processes_without_gpus_of_their_own_are_refused(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.raises(
            RunError, match=r"rank 1 needs a GPU of its own, and this machine has 1 .*--nproc-per-node 1, or"
        ),
        process_group.joined("auto", 1.0),
    ):
        pass


def test_half_an_environment_of_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(RunError, match=r"WORLD_SIZE is 2, but RANK, LOCAL_RANK, .* is not set: start .* torchrun"),
        process_group.joined("cpu", 1.0),
    ):
        pass
