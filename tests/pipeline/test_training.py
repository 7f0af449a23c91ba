from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from cs336_registry import cuda_graph
from cs336_registry.errors import UnknownNameError
from cs336_registry.pipeline import model, training
from cs336_registry.pipeline.checkpoints import Checkpoints
from cs336_registry.pipeline.errors import MismatchError, RunError
from cs336_registry.pipeline.evaluation import evaluate
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.resolved import resolve

QUIET = Progress(quiet=True)


def run(configuration, out: Path, **options) -> training.Summary:
    return training.train(configuration, out, progress=QUIET, **options)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in of_kind(read_metrics(out / "metrics.jsonl"), "step")]


def weights(out: Path) -> dict[str, torch.Tensor]:
    last = sorted((out / "checkpoints").glob("step-*"))[-1]
    return torch.load(last / "checkpoint.pt", weights_only=True)["model"]


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"
    evaluations = [of_kind(read_metrics(out / "metrics.jsonl"), "evaluation") for out in (one, other)]
    assert [[row["step"], row["loss"]] for row in evaluations[0]] == [
        [row["step"], row["loss"]] for row in evaluations[1]
    ]


class StopsAt(Progress):
    """Sends this process a signal behind a given step, as a user or a cluster would."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(quiet=True)
        self.step, self.number = step, number

    @contextlib.contextmanager
    def stage(self, name, total=None, unit="", done=0):
        progress, step = self, done

        class Stage:
            def advance(self, amount):
                nonlocal step
                step += amount
                if name == "training" and step == progress.step:
                    os.kill(os.getpid(), progress.number)

            def note(self, text):
                assert text.startswith("loss ")

        yield Stage()


@pytest.fixture(scope="module")
def finished(corpus_path, tmp_path_factory):
    """A run that nothing interrupted, to compare with."""
    from .conftest import TINY, load

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished") / "run"
    configuration = load("quickstart", [*TINY, f'data.train="{corpus_path}"', "data.validation_fraction=0.2"])
    return configuration, out, run(configuration, out)


def test_a_run_leaves_what_it_promises(finished):
    configuration, out, summary = finished
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in of_kind(rows, "step")] == list(range(1, 13))
    assert [row["step"] for row in of_kind(rows, "evaluation")] == [0, 6, 12]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    record = json.loads((out / "run.json").read_text())
    assert record["configuration"] == configuration.to_dict()
    assert {"bpe_trainer", "tokenizer", "transformer_lm", "adamw", "generate"} <= record["decisions"].keys()
    assert record["decisions"]["adamw"]["backend"] == "reference"
    assert record["baselines"].keys() == {"unigram", "bigram", "zlib", "lzma"}
    assert len(of_kind(rows, "sample")) == len(configuration.evaluation.prompts) == len(summary.samples)
    assert all(
        text.startswith(prompt) for text, prompt in zip(summary.samples, configuration.evaluation.prompts, strict=True)
    )
    assert record["accounting"]["parameters"] == sum(tensor.numel() for tensor in weights(out).values())


def test_the_loss_falls_and_begins_where_chance_is(finished):
    configuration, _, summary = finished
    first = of_kind(read_metrics(summary.folder / "metrics.jsonl"), "evaluation")[0]
    assert abs(first["loss"] - math.log(configuration.model.vocab_size)) < 0.5
    assert summary.evaluation.loss < first["loss"] - 0.1


def test_running_again_changes_nothing(finished):
    configuration, out, summary = finished
    before = losses(out)
    again = run(configuration, out)
    assert losses(out) == before
    assert again.evaluation == summary.evaluation
    assert again.samples == summary.samples


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_continues_exactly(finished, tmp_path, number):
    configuration, out, _ = finished
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        training.train(configuration, tmp_path / "run", progress=StopsAt(7, number))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-00000007"
    assert signal.getsignal(number) == before
    run(configuration, tmp_path / "run")
    assert_same_run(tmp_path / "run", out)


def test_a_run_cut_off_by_its_number_of_steps_can_be_lengthened(finished, tiny, tmp_path):
    _, out, _ = finished
    run(tiny("training.steps=8", "schedule.cosine_steps=12"), tmp_path / "run")
    run(tiny("training.steps=12", "schedule.cosine_steps=12"), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(out)


def test_another_seed_gives_another_run(finished, tiny, tmp_path):
    _, out, _ = finished
    run(tiny("training.seed=1"), tmp_path / "run")
    assert losses(tmp_path / "run")[0] != losses(out)[0]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        # The same numbers are summed in another order: float32's 6e-8 on each, grown by twelve steps of training.
        (["training.gradient_accumulation=2"], 1e-5),
        # The same operations on the same numbers.
        (["training.activation_checkpointing=true"], 0.0),
        # Products are rounded to 8 bits: 2^-9 of logits of about one, in a mean over many.
        (["training.precision=bfloat16"], 2e-2),
    ],
    ids=["accumulation", "recomputation", "bfloat16"],
)
def test_ways_of_computing_agree(finished, tiny, tmp_path, settings, tolerance):
    _, out, _ = finished
    run(tiny(*settings), tmp_path / "run")
    assert np.abs(np.subtract(losses(tmp_path / "run"), losses(out))).max() <= tolerance
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


def test_a_cuda_graph_needs_a_gpu(tiny, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(RunError, match=r"cuda_graph = true needs one process with a GPU, and this is device 'cpu'"):
        run(tiny("training.device=auto", "training.cuda_graph=true"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"cuda_graph = true replays a whole batch .* set cuda_graph = false"):
        tiny("training.device=auto", "training.cuda_graph=true", "training.gradient_accumulation=2")


def test_a_captured_pass_reads_every_batch_and_leaves_its_gradients(monkeypatch):
    """With a graph that is none: it computes again, into the memory that the first pass wrote to."""
    layer = torch.nn.Linear(3, 1, bias=False)

    def captured(call):
        memory = [call(), layer.weight.grad]

        def replay():
            for kept, new in zip(memory, (call(), layer.weight.grad), strict=True):
                kept.copy_(new)
            return memory[0]

        return replay

    monkeypatch.setattr(cuda_graph, "captured", captured)
    replayed = cuda_graph.CapturedPass(lambda x, y: torch.nn.functional.mse_loss(layer(x), y), [layer.weight])
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        x, y = torch.randn(4, 3), torch.randn(4, 1)
        found.append(replayed(x, y))
        gradient = layer.weight.grad.clone()
        layer.weight.grad = None
        expected = torch.nn.functional.mse_loss(layer(x), y)
        (expected_gradient,) = torch.autograd.grad(expected, layer.weight)
        assert torch.equal(found[-1], expected) and torch.equal(gradient, expected_gradient)
    assert len({float(loss) for loss in found}) == 3


@pytest.mark.parametrize("setting", ["precision=float32", "precision=bfloat16", "activation_checkpointing=true"])
def test_a_cuda_graph_trains_as_well(tiny, tmp_path, setting):
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a GPU: nothing of theirs is proven here")
    settings = ("training.device=cuda", f"training.{setting}", "backend=triton")
    for name, graph in (("eager", "false"), ("graph", "true"), ("again", "true")):
        run(tiny(*settings, f"training.cuda_graph={graph}"), tmp_path / name)
    assert losses(tmp_path / "graph") == losses(tmp_path / "again")
    np.testing.assert_allclose(losses(tmp_path / "graph"), losses(tmp_path / "eager"), rtol=1e-3)


@pytest.mark.parametrize("setting", ["norm=none", "norm=post", "position=none", "ffn=silu", "num_kv_heads=1"])
def test_ablations_train(finished, tiny, tmp_path, setting):
    _, out, _ = finished
    run(tiny(f"model.{setting}", "training.steps=4", "schedule.cosine_steps=12"), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert all(map(math.isfinite, found)) and found != losses(out)[:4]


def test_a_diverging_run_says_where_and_keeps_its_checkpoints(tiny, tmp_path):
    configuration = tiny("optimizer.lr=1e38", "schedule.warmup_steps=0", "checkpoint.every=1")
    with pytest.raises(RunError, match=r"diverged at step \d+: loss .*(nan|inf).*is kept\. Lower optimizer"):
        run(configuration, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    diverged = of_kind(rows, "divergence")[0]["step"]
    assert all(math.isfinite(row["loss"]) for row in of_kind(rows, "step"))
    assert (
        max(Checkpoints(tmp_path / "run" / "checkpoints", None, None, keep_last=1, keep_best=False).steps()) < diverged
    )


def test_another_configuration_is_refused(finished, tiny):
    _, out, _ = finished
    before = losses(out)
    with pytest.raises(MismatchError, match=r"optimizer\.lr was 0\.004, is now 1\.0"):
        run(tiny("optimizer.lr=1"), out)
    assert losses(out) == before


def test_another_backend_is_refused(finished, tiny):
    _, out, _ = finished
    with pytest.raises(MismatchError, match=r"adamw was served by reference .*, would be by torch"):
        run(tiny("backend=adamw=torch"), out)


def test_a_damaged_checkpoint_is_refused_and_the_earlier_one_continues(finished, tmp_path):
    configuration, out, _ = finished
    with pytest.raises(KeyboardInterrupt):
        training.train(configuration, tmp_path / "run", progress=StopsAt(7, signal.SIGTERM))
    last = tmp_path / "run" / "checkpoints" / "step-00000007"
    content = (last / "checkpoint.pt").read_bytes()
    (last / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(MismatchError, match=r"can't be loaded .*delete .*step-00000007 to continue from an earlier"):
        run(configuration, tmp_path / "run")
    (last / "checkpoint.pt").unlink()
    (last / "state.json").unlink()
    last.rmdir()
    run(configuration, tmp_path / "run")
    assert_same_run(tmp_path / "run", out)


def test_a_full_disk_loses_nothing_that_was_saved(finished, tmp_path):
    configuration, out, _ = finished
    with pytest.raises(KeyboardInterrupt):
        training.train(configuration, tmp_path / "run", progress=StopsAt(5, signal.SIGTERM))
    size = (tmp_path / "run" / "checkpoints" / "step-00000005" / "checkpoint.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        with pytest.raises(RunError, match=r"step 10 can't be written .* Step 5 is kept: make room"):
            run(configuration, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    run(configuration, tmp_path / "run")
    assert_same_run(tmp_path / "run", out)


def test_a_checkpoint_is_there_before_the_evaluation(finished, tiny, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError("evaluation")

    configuration = tiny("evaluation.every=5")
    run(tiny("evaluation.every=5", "training.steps=4", "schedule.cosine_steps=12"), tmp_path / "run")
    monkeypatch.setattr(training, "evaluate", fails)
    with pytest.raises(ZeroDivisionError):
        run(tiny("evaluation.every=5", "schedule.cosine_steps=12"), tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    monkeypatch.undo()
    run(configuration, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(finished[1])


def test_the_best_checkpoint_is_kept(tiny, tmp_path):
    """The learning rate ruins the model after its first steps, so an early checkpoint is the best."""
    run(
        tiny("optimizer.lr=0.5", "evaluation.every=2", "checkpoint.every=2", "checkpoint.keep_last=1"),
        tmp_path / "run",
    )
    evaluations = of_kind(read_metrics(tmp_path / "run" / "metrics.jsonl"), "evaluation")
    best = min((row for row in evaluations if 0 < row["step"] < 12), key=lambda row: row["loss"])["step"]
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({best, 12})


def test_a_run_in_use_is_locked(finished, tmp_path):
    from cs336_registry.pipeline.run_folder import RunFolder

    configuration, out, _ = finished
    with RunFolder(out).locked(), pytest.raises(RunError, match="another process is working in"):
        run(configuration, out)


def test_no_resume_refuses_to_touch_a_run(finished):
    configuration, out, _ = finished
    with pytest.raises(FileExistsError, match="holds a run: continue it"):
        run(configuration, out, resume=False)


def test_cuda_without_a_gpu_says_why(tiny, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RunError, match=r"training\.device = 'cuda', but .*: set training\.device=cpu or auto"):
        run(tiny("training.device=cuda"), tmp_path / "run")


@pytest.mark.parametrize("setting", ["backend", "text_backend"])
def test_an_unknown_backend_is_told_before_the_corpus_is_prepared(tiny, tmp_path, monkeypatch, setting):
    monkeypatch.setattr("cs336_registry.pipeline.corpus.prepare", lambda *_: pytest.fail("the corpus was prepared"))
    with pytest.raises(UnknownNameError, match=r"unknown backend \(from argument\) 'tourch': did you mean 'torch'"):
        run(tiny(f"{setting}=tourch"), tmp_path / "run")


def test_evaluation_is_the_mean_over_all_predicted_tokens():
    ids = np.arange(100, dtype=np.uint16) % 7
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0))

    def forward(inputs):
        return logits.expand(*inputs.shape, 7)

    token_bytes = [0, 1, 2, 3, 4, 5, 6]
    cross_entropy = resolve(None, "cpu", ("cross_entropy",))["cross_entropy"]
    found = evaluate(
        forward, ids, token_bytes, cross_entropy, context_length=10, sequences=99, batch_size=4, device="cpu"
    )
    predicted = ids[1:91]
    nats = -torch.log_softmax(logits.double(), 0)[torch.from_numpy(predicted.astype(np.int64))]
    assert found.tokens == 90
    assert found.loss == pytest.approx(nats.mean().item(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(nats.sum().item() / math.log(2) / predicted.astype(int).sum(), rel=1e-6)


def test_first_weights_depend_on_the_seed_alone(tiny):
    configuration = tiny()
    build = resolve(None, "cpu", ("transformer_lm",))["transformer_lm"]
    torch.manual_seed(5)
    first = model.build(configuration, build, "cpu").state_dict()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn), "building a model must leave the global generator as it was"
    second = model.build(configuration, build, "cpu").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
