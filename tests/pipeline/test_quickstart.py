from __future__ import annotations

import subprocess
import sys

import pytest

from cs336_registry.cli.quickstart import quickstart
from cs336_registry.cli.report import report
from cs336_registry.cli.train import train
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.quickstart import configure

from .conftest import TINY


@pytest.mark.slow
def test_the_quickstart_runs_end_to_end_on_your_own_text(corpus_path, tmp_path, capfd):
    out = tmp_path / "run"
    assert quickstart(corpus=corpus_path, out=out, steps=2, text_backend="reference") == 0
    printed = capfd.readouterr().err
    assert "bpe_trainer by reference" in printed and "the model by reference" in printed
    assert "bits per byte   zlib" in printed and "bits per byte   this model" in printed
    assert (out / "report.html").stat().st_size > 20_000
    assert (out / "data" / "train.npy").is_file()
    assert [row["step"] for row in of_kind(read_metrics(out / "metrics.jsonl"), "step")] == [1, 2]


def test_the_choices_of_the_command_line_reach_the_configuration(tmp_path):
    corpus = tmp_path / 'odd "name".txt'
    configuration = configure(corpus=corpus, backend="torch,adamw=reference", steps=40, seed=7)
    assert configuration.data.train == str(corpus)
    assert configuration.evaluation.prompts == ("", "", "")
    assert configuration.backend == "torch,adamw=reference"
    assert (configuration.training.steps, configuration.schedule.warmup_steps) == (40, 10)
    assert configuration.training.seed == 7
    assert configure().text_backend == "auto"


def test_train_and_report_from_the_command_line(corpus_path, tmp_path, capfd):
    settings = [*TINY, f'data.train="{corpus_path}"', "training.steps=4"]
    assert train("quickstart", set=settings, out=tmp_path / "run", backend="reference") == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert report(tmp_path / "run", tmp_path / "run", out=tmp_path / "both.html") == 0
    assert (tmp_path / "both.html").is_file()
    assert "both.html" in capfd.readouterr().out
    with pytest.raises(ValueError, match="name at least one run's folder"):
        report()


def test_progress_without_a_terminal_is_plain_lines(capsys, monkeypatch):
    import cs336_registry.pipeline.progress as module

    monkeypatch.setattr(module, "PLAIN_INTERVAL", 0.0)
    progress = Progress()
    with progress.stage("encoding", 4_000_000, "B") as stage:
        stage.advance(1_000_000)
        stage.note("almost there")
        stage.advance(3_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("encoding: 1.0 MB of 4.0 MB, ") and lines[0].endswith(" left")
    assert lines[-1].startswith("encoding: 4.0 MB in ") and lines[-1].endswith(", almost there")
    with Progress(quiet=True).stage("nothing", 3) as stage:
        stage.advance(3)
    assert capsys.readouterr().err == ""


def test_progress_in_a_terminal_is_a_bar_with_rate_and_time_left(monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    terminal = Terminal()
    with Progress(terminal).stage("training", 10, "steps") as stage:
        stage.note("loss 3.2")
        stage.advance(10)
    shown = terminal.getvalue()
    assert "training" in shown and "100%" in shown and "steps/s" in shown and "left" in shown and "loss 3.2" in shown


def test_everything_before_training_loads_no_framework():
    modules = ("configuration", "corpus", "tokenization", "tokens", "run_data", "report", "quickstart")
    code = "import sys\n" + "".join(f"import cs336_registry.pipeline.{name}\n" for name in modules)
    code += "print(sorted({'torch', 'triton', 'numba', 'matplotlib'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
