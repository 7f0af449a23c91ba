from __future__ import annotations

import re
import tomllib

import pytest

from cs336_registry import cli
from cs336_registry.errors import ConfigurationError
from cs336_registry.pipeline.configuration import Configuration, differences, from_dict, load, shipped


@pytest.mark.parametrize("name", shipped())
def test_shipped_configurations_load(name):
    configuration = load(name)
    assert configuration.name == name
    assert from_dict(configuration.to_dict()) == configuration


@pytest.mark.parametrize("name", shipped())
def test_what_is_printed_is_read_as_the_same_configuration(name, tmp_path, capsys):
    settings = ["optimizer.max_gradient_norm=none", "optimizer.eps=1e-12", "training.compile=true"]
    settings += ['tokenizer.special_tokens=["\\"\\\\\\u007f\\u0000\\n", "ü🙂"]', "data.train=none at all"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", name, *(word for one in settings for word in ("--set", one)), "--print"])
    printed = capsys.readouterr().out
    (tmp_path / "printed.toml").write_text(printed, encoding="utf-8")
    assert load(tmp_path / "printed.toml") == load(name, settings)
    written, wanted = tomllib.loads(printed), load(name, settings).to_dict()
    assert {key: set(value) for key, value in written.items() if isinstance(value, dict)} == {
        key: set(value) for key, value in wanted.items() if isinstance(value, dict)
    }
    assert written["optimizer"]["max_gradient_norm"] == "none"


def test_the_course_configuration_is_the_course_s():
    configuration = load("tinystories_17m")
    model = configuration.model
    assert (model.vocab_size, model.context_length, model.d_model, model.d_ff) == (10_000, 256, 512, 1344)
    assert (model.num_layers, model.num_heads, model.rope_theta) == (4, 16, 10_000)
    assert configuration.tokens_per_step * configuration.training.steps == 327_680_000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr': did you mean 'lr'?"),
        ("optimzer.lr=1", "unknown key 'optimzer': did you mean 'optimizer'?"),
        ("optimizer.lr=-1", "optimizer.lr = -1: expected float > 0.0"),
        ("optimizer.lr=inf", "lr = inf: it must be a finite number"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas = [0.9, 1.5]: expected float < 1.0"),
        ("model.norm=rsm", "model.norm = 'rsm': did you mean 'rms'? known: none, post, rms"),
        ("model.d_model=12.5", "model.d_model = 12.5: expected int, got float"),
        ("model.num_heads=3", "can't be divided among num_heads = 3"),
        ("model.num_heads=128", "rope rotates pairs"),
        ("model.num_kv_heads=3", "num_kv_heads = 3 does not divide num_heads = 4"),
        ("model.vocab_size=200", "model.vocab_size = 200 is below 257"),
        ("training.compile=perhaps", "training.compile = 'perhaps': expected bool, got str"),
        ("training.gradient_accumulation=3", "can't be divided by gradient_accumulation = 3"),
        ("schedule.warmup_steps=500", "cosine, which ends at training.steps = 500: set schedule.warmup_steps below"),
        (
            "training.steps=20",
            "schedule.warmup_steps = 25 leaves no step for the cosine, which ends at training.steps = 20",
        ),
        (
            "schedule.cosine_steps=9",
            "schedule.cosine_steps = 9: set schedule.warmup_steps below that, or raise schedule.c",
        ),
        ("schedule.cosine_steps=0", "schedule.cosine_steps = 0: expected int >= 1"),
        ("schedule.cosine_steps=half", "schedule.cosine_steps = 'half': expected int or \"none\", got str"),
        ("tokenizer.special_tokens=[]", "needs one to stand between documents"),
        ("model=3", "model = 3: expected object"),
        ("lr", "can't read --set 'lr': write section.key=value"),
        ("a.b.c=1", "can't read --set 'a.b.c=1'"),
    ],
)
def test_bad_settings_name_the_value_and_the_cure(setting, message):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load("quickstart", [setting])


def test_settings_are_toml_or_plain_text():
    configuration = load("quickstart", ["optimizer.lr=3e-4", "data.train=my text.txt", "backend=triton,adamw=torch"])
    assert configuration.optimizer.lr == 3e-4
    assert configuration.data.train == "my text.txt"
    assert configuration.backend == "triton,adamw=torch"
    assert load("quickstart", ["optimizer.max_gradient_norm=none"]).optimizer.max_gradient_norm is None
    assert load("quickstart", ["model.norm=none"]).model.norm == "none"


def test_unknown_configurations_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="did you mean 'quickstart'"):
        load("quickstat")
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    with pytest.raises(ConfigurationError, match=r"broken\.toml is not TOML"):
        load(broken)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[optimizer]\nlr = 0.5\n')
    assert load(path, ["optimizer.eps=1e-6"]) == from_dict({"name": "mine", "optimizer": {"lr": 0.5, "eps": 1e-6}})


def test_differences_are_those_that_change_weights():
    before = load("quickstart").to_dict()
    assert differences(before, load("quickstart", ["evaluation.every=3", "checkpoint.keep_last=9"]).to_dict()) == []
    assert differences(before, load("quickstart", ["optimizer.lr=1"]).to_dict()) == [("optimizer.lr", 0.004, 1.0)]
    longer = load("quickstart", ["training.steps=600"]).to_dict()
    assert differences(before, longer) == [("schedule.cosine_steps", 500, 600)]
    same_schedule = load("quickstart", ["training.steps=600", "schedule.cosine_steps=500"]).to_dict()
    assert differences(before, same_schedule) == []


def test_defaults_are_valid():
    assert from_dict({}) == Configuration()


def test_what_was_left_at_its_default_is_in_the_record():
    """msgspec leaves defaults out of the objects it makes; run.json must hold every hyper-parameter all the same."""
    record = load("tinystories_17m").to_dict()
    assert record["evaluation"]["temperature"] == 0.8
    assert set(record["evaluation"]) == set(load("quickstart").to_dict()["evaluation"])
    assert set(record) == set(load("quickstart").to_dict())
