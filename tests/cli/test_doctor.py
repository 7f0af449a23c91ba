"""The doctor finds what would fail, says what to do, and estimates memory as it is measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cs336_registry as registry
from cs336_registry.cli import main
from cs336_registry.pipeline import canary, doctor_configuration, doctor_machine, model_costs
from cs336_registry.pipeline.accounting import account
from cs336_registry.pipeline.checkpoints import Checkpoints
from cs336_registry.pipeline.configuration import Configuration, ModelConfiguration, load
from cs336_registry.pipeline.doctor import Finding, examine
from cs336_registry.pipeline.model import build
from cs336_registry.pipeline.resolved import resolve
from cs336_registry.plugin import PluginStatus

SHAPES = {
    "course": {},
    "grouped_query": {"num_kv_heads": 2},
    "no_norm": {"norm": "none"},
    "silu": {"ffn": "silu"},
    "tied": {"tie_embeddings": True},
}


def small(**changes) -> ModelConfiguration:
    sizes = {"vocab_size": 400, "context_length": 48, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 160}
    return ModelConfiguration(**{**sizes, **changes})


def of(findings, subject: str) -> list[Finding]:
    return [finding for finding in findings if finding.subject == subject]


def configured(*settings: str) -> Configuration:
    return load("quickstart", settings)


def run(capsys, *words: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *words])
    return stopped.value.code or 0, capsys.readouterr().out


def test_a_healthy_machine_and_configuration(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_machine, "available_memory", lambda: 8 * 2**30)
    code, out = run(capsys, "quickstart", "--no-canary", "--out", str(tmp_path / "run"))
    assert code == 0 and "nothing stands in the way for quickstart" in out
    assert "memory: about" in out and "disk: about" in out and "standard library" in out


def test_json_and_the_exit_status_of_a_problem(capsys, monkeypatch):
    monkeypatch.setenv("CS336_BACKND", "torch")
    code, out = run(capsys, "--no-canary", "--json")
    found = {entry["subject"]: entry for entry in json.loads(out)}
    assert code == 1
    assert found["CS336_BACKND"]["level"] == "problem"
    assert "unset CS336_BACKND; did you mean 'CS336_BACKEND'" in found["CS336_BACKND"]["advice"]
    assert found["torch"]["level"] == "ok" and found["memory"]["level"] == "ok"


def test_what_a_configuration_lacks_is_a_problem_each(tmp_path):
    configuration = configured(
        f'data.train="{tmp_path / "nothing.txt"}"', f'tokenizer.path="{tmp_path}"', "backend=attention=liger"
    )
    found = {f.subject: f for f in examine(configuration, out=tmp_path, canary_seconds=0) if f.level == "problem"}
    assert "there is no file" in found["data.train"].found
    assert "lacks vocab.json and merges.txt" in found["tokenizer.path"].found
    assert "attention" in found["transformer_lm"].found


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the GPU of a machine that has none")
def test_a_gpu_that_is_not_there():
    (finding,) = of(doctor_configuration.components(configured("training.device=cuda")), "training.device")
    assert finding.level == "problem" and finding.advice == "set training.device=cpu or auto"


def test_too_little_memory_says_how_to_need_less(monkeypatch):
    monkeypatch.setattr(doctor_configuration, "available_memory", lambda: 2 * 2**30)
    settings = ("training.batch_size=512", "training.device=cpu")
    (finding,) = of(doctor_configuration.memory(configured(*settings, "backend=reference")), "memory")
    assert finding.level == "problem"
    assert finding.advice.startswith("raise training.gradient_accumulation, set training.activation_checkpointing=true")
    assert "backend=torch" in finding.advice
    (fused,) = of(doctor_configuration.memory(configured(*settings, "backend=torch")), "memory")
    assert "backend=torch" not in fused.advice
    (large,) = of(doctor_configuration.memory(configured("training.device=cpu", "model.d_model=8192")), "memory")
    assert "alone are too large" in large.advice
    monkeypatch.setattr(doctor_configuration, "available_memory", lambda: None)
    assert of(doctor_configuration.memory(configured(*settings)), "memory")[0].level == "note"


def test_too_little_disk(monkeypatch, tmp_path):
    usage = doctor_configuration.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor_configuration.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    (finding,) = doctor_configuration.disk(configured(), tmp_path / "not" / "there")
    assert finding.level == "problem" and "lower checkpoint.keep_last" in finding.advice
    assert str(tmp_path) in finding.found


def test_plugins_that_are_broken_or_blocked(monkeypatch):
    rows = {
        "bad": PluginStatus("bad", "broken", "ImportError: no", distribution="cs336-bad"),
        "good": PluginStatus("good", "ok"),
        "off": PluginStatus("off", "blocked", "blocked by name"),
    }
    monkeypatch.setattr(registry, "backends", lambda: rows)
    found = {finding.subject: finding for finding in doctor_machine.plugins()}
    assert found["backends"].found == "good"
    assert found["backend bad"].level == "warning" and "uninstall cs336-bad" in found["backend bad"].advice
    assert found["backend off"].level == "note" and "CS336_BLOCK" in found["backend off"].advice


def test_a_selector_that_can_not_be_read(monkeypatch):
    monkeypatch.setenv("CS336_BACKEND", "triton;adamw")
    (finding,) = of(doctor_machine.environment(), "selection")
    assert finding.level == "problem" and "can't read 'triton;adamw'" in finding.found


def test_the_interpreter_is_told(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert of(doctor_machine.environment(), "TRITON_INTERPRET")[0].level in ("note", "warning")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not of(doctor_machine.environment(), "TRITON_INTERPRET")


@pytest.mark.parametrize(
    ("name", "number", "level"),
    [
        ("python", "3.10.4", "problem"),
        ("python", "3.15.0", "warning"),
        ("torch", "2.13.0+cu130", "ok"),
        ("torch", "2.9.1", "problem"),
        ("triton", "3.7.1", "ok"),
    ],
)
def test_releases(name, number, level):
    assert doctor_machine._release(name, number).level == level


def test_without_a_compiler_the_canary_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    (finding,) = doctor_machine.compiler(None, 60)
    assert finding.level == "note" and "the canary was left out" in finding.found
    (finding,) = doctor_machine.compiler(configured("training.compile=true"), 60)
    assert finding.level == "problem" and "set training.compile=false" in finding.advice


def test_a_canary_that_takes_too_long_or_fails():
    slow = doctor_machine.canary("cpu", "float32", None, 0.05, wanted=True)
    assert slow.level == "warning" and "did not compile within 0.05 s" in slow.found


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="process groups are posix")
@pytest.mark.parametrize("end", ["SIGINT", "SIGKILL"])
def test_the_canary_and_its_compiler_end_with_the_doctor(tmp_path, end):
    psutil = pytest.importorskip("psutil", reason="needs the development group")
    (tmp_path / "compiler").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "compiler").chmod(0o755)
    environment = os.environ | {"CXX": str(tmp_path / "compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    code = "from cs336_registry.cli import main; main(['doctor'])"
    doctor = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    found = []
    while not any(one.name() == "sleep" for one in found):
        assert time.monotonic() < deadline, "the compiler is never asked"
        time.sleep(0.1)
        found = psutil.Process(doctor.pid).children(recursive=True)
    doctor.send_signal(getattr(signal, end))
    _, errors = doctor.communicate(timeout=60)
    gone, alive = psutil.wait_procs(found, timeout=15)
    for left in alive:
        left.kill()
    assert (len(gone), alive, errors) == (2, [], b"")


@pytest.mark.slow
def test_a_canary_that_fails_says_why():
    failed = doctor_machine.canary("cpu", "float32", "nobody", 300, wanted=True)
    assert failed.level == "problem" and "'nobody'" in failed.found
    assert doctor_machine.canary("cpu", "float32", "nobody", 300, wanted=False).level == "warning"


@pytest.mark.slow
@pytest.mark.skipif(
    not any(os.access(Path(folder) / "g++", os.X_OK) for folder in os.environ["PATH"].split(os.pathsep)),
    reason="torch.compile needs a C++ compiler",
)
def test_a_compiled_step_agrees_here():
    finding = doctor_machine.canary("cpu", "float32", "reference", 500, wanted=True)
    assert finding.level == "ok", finding


def test_the_canary_sings_of_nan_and_of_wrong_numbers():
    generator = torch.Generator().manual_seed(0)
    truth = {"the loss": torch.tensor(3.0).double(), "w": torch.randn(8, 8, generator=generator).double()}
    eager = {name: value.float() for name, value in truth.items()}
    unit = 2.0**-24
    assert canary.judge(eager, eager, truth, unit) is None
    assert canary.judge({**eager, "w": eager["w"] * (1 + 1e-6)}, eager, truth, unit) is None
    broken = eager["w"].clone()
    broken[3, 3] = float("nan")
    assert canary.judge({**eager, "w": broken}, eager, truth, unit) == "w is NaN or infinite"
    wrong = canary.judge({**eager, "w": eager["w"] * 1.001}, eager, truth, unit)
    assert wrong is not None and wrong.startswith("w is off by")
    assert canary.judge({"the loss": eager["the loss"]}, eager, truth, unit) == "w is missing"


def test_a_canarys_bad_news_is_passed_on(monkeypatch, tmp_path):
    package = tmp_path / "python"
    package.write_text('#!/bin/sh\necho \'{"problem": "the loss is NaN or infinite", "seconds": 1.0}\'\n')
    package.chmod(0o755)
    monkeypatch.setattr(doctor_machine.sys, "executable", str(package))
    finding = doctor_machine.canary("cpu", "bfloat16", None, 30, wanted=True)
    assert finding.level == "problem"
    assert finding.found == "a compiled training step is wrong on cpu in bfloat16: the loss is NaN or infinite"
    assert "set training.compile=false" in finding.advice


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_counts_before_building_are_those_of_the_built_model(shape):
    settings = small(**SHAPES[shape])
    configuration = Configuration(model=settings)
    model = build(configuration, resolve("reference", "cpu", ("transformer_lm",))["transformer_lm"], "cpu")
    found = account(model, settings)
    assert sum(model_costs.parameters(settings).values()) == found.parameters
    assert 3 * sum(model_costs.forward_flops(settings).values()) == found.flops_per_token * settings.context_length


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_activations_are_as_measured(shape, backend):
    """The storages that autograd keeps, each counted once, without weights and tables."""
    settings, batch = small(**SHAPES[shape]), 4
    configuration = load("quickstart", [f"training.batch_size={batch}"])
    configuration = Configuration(model=settings, training=configuration.training)
    components = resolve(backend, "cpu", ("transformer_lm", "cross_entropy"))
    model = build(configuration, components["transformer_lm"], "cpu")
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(settings.vocab_size, (batch, settings.context_length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        components["cross_entropy"](model(ids), ids)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    estimated = model_costs.training_memory(configuration, fused=backend == "torch").activations
    assert estimated == pytest.approx(measured, rel=0.08)


def test_checkpoints_take_what_was_estimated(tmp_path):
    configuration = Configuration(model=small())
    components = resolve("reference", "cpu", ("transformer_lm", "adamw", "save_checkpoint", "load_checkpoint"))
    model = build(configuration, components["transformer_lm"], "cpu")
    optimizer = components["adamw"](model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    saved = Checkpoints(
        tmp_path, components["save_checkpoint"], components["load_checkpoint"], keep_last=2, keep_best=True
    )
    saved.save(1, model, optimizer, {})
    size = (saved.path(1) / "checkpoint.pt").stat().st_size
    assert model_costs.checkpoint_bytes(configuration) / 4 == pytest.approx(size, rel=0.1)


def test_checkpointing_needs_less():
    need = model_costs.training_memory(configured())
    less = model_costs.training_memory(configured("training.activation_checkpointing=true"))
    part = model_costs.training_memory(configured("training.gradient_accumulation=4"))
    assert less.activations < need.activations and less.weights == need.weights
    assert part.activations * 4 == need.activations
    assert need.total == need.weights + need.gradients + need.optimizer + need.activations
