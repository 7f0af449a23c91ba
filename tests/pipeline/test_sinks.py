"""TensorBoard's own reader finds what metrics.jsonl holds. trackio and wandb are stood in for by recorders of the calls
that their documentation describes: init(...) gives a run with log(values, step=...) and finish()."""

from __future__ import annotations

import logging
import signal
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

from cs336_registry.pipeline import sinks, training
from cs336_registry.pipeline.errors import RunError
from cs336_registry.pipeline.metrics import of_kind, read_metrics
from cs336_registry.pipeline.progress import Progress

from .test_training import StopsAt

QUIET = Progress(quiet=True)


class Recorder(ModuleType):
    """A logging package that keeps what it is told."""

    def __init__(self, name: str, fails_at: int | None = None) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.fails_at, self.started, self.logged, self.finished = fails_at, [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("the service is away")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def recorder(monkeypatch):
    def install(name, **options):
        module = Recorder(name, **options)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def rows_of(out, kind="step"):
    return of_kind(read_metrics(out / "metrics.jsonl"), kind)


def test_tensorboard_shows_an_interrupted_run_as_its_metrics_have_it(tiny, tmp_path):
    pytest.importorskip("tensorboard", reason="needs cs336-registry[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    configuration = tiny('metrics.sinks=["tensorboard"]')
    with pytest.raises(KeyboardInterrupt):
        training.train(configuration, tmp_path, progress=StopsAt(7, signal.SIGTERM))
    training.train(configuration, tmp_path, progress=QUIET)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for kind, value in (("step", "loss"), ("step", "lr"), ("evaluation", "bits_per_byte")):
        found = [(event.step, event.value) for event in events.Scalars(f"{kind}/{value}")]
        assert found == [(row["step"], pytest.approx(row[value])) for row in rows_of(tmp_path, kind)]
    (text,) = [events.Tensors(tag) for tag in events.Tags()["tensors"]][:1]
    assert text[0].step == 12


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_service_is_told_every_row_and_finds_the_run_again(tiny, tmp_path, recorder, name):
    module = recorder(name)
    configuration = tiny(f'metrics.sinks=["{name}"]', "metrics.project=trials", "name=small")
    with pytest.raises(KeyboardInterrupt):
        training.train(configuration, tmp_path, progress=StopsAt(7, signal.SIGTERM))
    training.train(configuration, tmp_path, progress=QUIET)
    assert [step for step, values in module.logged if "step/loss" in values] == list(range(1, 13))
    assert [values["evaluation/loss"] for _, values in module.logged if "evaluation/loss" in values] == [
        row["loss"] for row in rows_of(tmp_path, "evaluation")
    ]
    first, second = module.started
    assert first == second and module.finished == 2
    assert (first["project"], first["resume"]) == ("trials", "allow")
    assert first["name"].startswith("small") and first["config"]["optimizer"]["lr"] == configuration.optimizer.lr


def test_a_sink_that_fails_costs_no_step(tiny, tmp_path, recorder, caplog):
    module = recorder("wandb", fails_at=5)
    with caplog.at_level(logging.WARNING):
        training.train(tiny('metrics.sinks=["wandb"]'), tmp_path, progress=QUIET)
    assert len(rows_of(tmp_path)) == 12 and module.logged[-1][0] == 4
    assert caplog.messages == [
        "the metrics sink wandb failed (ConnectionError: the service is away): the run goes on without it; "
        "metrics.jsonl has every row"
    ]


def test_a_missing_package_is_told_before_any_work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"names 'trackio', which is not installed: pip install 'cs336-registry\[track"):
        training.train(tiny('metrics.sinks=["trackio"]'), tmp_path, progress=QUIET)
    assert not (tmp_path / "data").exists() and not (tmp_path / "metrics.jsonl").exists()
