"""The handout: every deliverable is listed with a command that exists, what is run is on the page, and it restarts."""

from __future__ import annotations

import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from cs336_registry import cli
from cs336_registry.pipeline import handout as module
from cs336_registry.pipeline import handout_page, training
from cs336_registry.pipeline.configuration import load
from cs336_registry.pipeline.handout import experiments, make
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.progress import Progress

QUIET = Progress(quiet=True)
TOML = """
name = "tiny"
description = "made-up sentences"
text_backend = "reference"
[data]
train = {train!r}
validation_fraction = 0.2
[model]
vocab_size = 280
context_length = 16
d_model = 16
num_layers = 1
num_heads = 2
d_ff = 32
[training]
steps = 6
batch_size = 4
device = "cpu"
log_every = 1
[schedule]
warmup_steps = 2
[evaluation]
every = 3
sequences = 8
final_sequences = 16
sample_tokens = 4
temperature = 0.8
top_p = 0.95
[checkpoint]
every = 3
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("handout")
    words = ["the", "cat", "sees", "a", "dog", "under", "the", "old", "tree", "and", "one", "bird"]
    documents = [" ".join(words[(i * k) % len(words)] for i in range(120)) for k in range(1, 25)]
    (folder / "text.txt").write_text("<|endoftext|>".join(documents), encoding="utf-8")
    (folder / "tiny.toml").write_text(TOML.format(train=str(folder / "text.txt")), encoding="utf-8")
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """The handout of the tiny configuration, with all its runs."""
    return make(str(source), tmp_path_factory.mktemp("made") / "out", full=True, progress=QUIET)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.figures = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.figures += tag == "figure"
        assert not {"src", "action"} & {name for name, _ in attributes}
        if tag not in ("meta", "link", "line", "circle", "path", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


@pytest.mark.slow
def test_everything_is_on_the_page(made):
    text = (made.out / "handout.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    wanted = ["Deliverables", "Accounting", "Tokenizer", "Base model", "Learning-rate sweep"]
    wanted += ["A divergent learning rate", "Batch-size sweep"]
    assert page.titles == [*wanted, "Ablations", "Generation", "Experiment log"]
    assert page.figures == 10
    assert all(
        name in made.runs and f"--out {made.out / name}" in text for one in made.experiments for name in one.runs
    )
    assert "not yet" not in text and "https:" not in text and "825 GB would take" in text
    assert made.completion is not None and made.completion.tokens > 0 and made.encoding[0]["bytes_per_token"] > 1


@pytest.mark.slow
def test_a_divergent_run_is_a_result(made):
    run = made.runs["lr_divergent"]
    # Worse than before the first step.
    assert "lr_divergent" in made.failed or run.last["loss"] > run.evaluations[0]["loss"]
    assert made.runs["base"].last["loss"] < made.runs["base"].evaluations[0]["loss"]


@pytest.mark.slow
def test_started_again_it_trains_nothing(made, monkeypatch):
    monkeypatch.setattr(training.Trainer, "_train_step", lambda self: pytest.fail("a finished run was trained again"))
    again = make(made.source, made.out, full=True, progress=QUIET)
    assert list(again.runs) == list(made.runs)
    assert again.failed == made.failed


@pytest.mark.slow
def test_every_run_can_be_repeated_by_its_command(made, tmp_path, capsys):
    words = shlex.split(made.command("silu").replace(str(made.out / "silu"), str(tmp_path / "again")))
    assert words[:2] == ["cs336", "train"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words[1:])
    assert not stopped.value.code
    losses = [
        [row["loss"] for row in of_kind(read_metrics(folder / "metrics.jsonl"), "step")]
        for folder in (made.out / "silu", tmp_path / "again")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_divergence_is_kept_and_not_tried_again(source, tmp_path, monkeypatch):
    """With a loss that is no number the run stops; the next handout reads it from the metrics."""
    configuration = load(str(source), [f"data.folder={tmp_path / 'data'}"])
    made = module.Handout(str(source), configuration, tmp_path, True, (f"data.folder={tmp_path / 'data'}",), ())
    changes = ("optimizer.lr=1e30", "optimizer.max_gradient_norm=none")
    module._train(made, "wild", changes, QUIET)
    assert made.failed["wild"].startswith("diverged at step ") and made.runs["wild"].last is not None
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("it was tried again"))
    made.failed.clear()
    module._train(made, "wild", changes, QUIET)
    assert made.failed["wild"].startswith("diverged at step ")


def test_the_listed_commands_exist():
    for _, _, command, _ in handout_page.ELSEWHERE:
        words = shlex.split(command)
        assert words[0] == "cs336"
        name = cli._find(words[1:])
        assert name is not None, command
        if words[1] == "train":
            load(words[2])


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["quickstart", "tinystories_17m"])
def test_every_run_is_a_valid_configuration(name, full):
    settings = [] if full else module.SMALL
    base = load(name, settings)
    for one in experiments(base, full):
        for changes in one.runs.values():
            changed = load(name, [*settings, *changes])
            assert changed.training.steps * changed.training.batch_size == pytest.approx(
                base.training.steps * base.training.batch_size, rel=0.05
            )
    assert {"norm", "position", "ffn"} == {
        change.partition("=")[0].removeprefix("model.")
        for change in (
            changes[0] for one in experiments(base, full) if one.key == "ablations" for changes in one.runs.values()
        )
    }
