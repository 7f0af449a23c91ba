"""Import of a Hugging Face Llama folder: the same logits, the same bits after a round trip, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from cs336_registry.cli.generate import generate
from cs336_registry.pipeline import training
from cs336_registry.pipeline.export import export
from cs336_registry.pipeline.import_ import import_, model_settings, read_weights
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.trained import load, weights

from .conftest import TINY
from .conftest import load as load_configuration

# Importing transformers takes most of the time, which every test here needs for the folder that it reads.
pytestmark = pytest.mark.slow

QUIET = Progress(quiet=True)
SHAPES = {
    "grouped_query": ("model.num_heads=4", "model.num_kv_heads=2", "model.num_layers=2"),
    "tied": ("model.tie_embeddings=true", "model.rope_theta=500.0"),
}


@pytest.fixture(scope="module")
def runs_and_folders(corpus_path, tmp_path_factory):
    """shape -> (run, the folder it was exported to)."""
    home = tmp_path_factory.mktemp("exported")
    for shape, settings in SHAPES.items():
        configuration = load_configuration(
            "quickstart", [*TINY, f'data.train="{corpus_path}"', "training.steps=4", *settings]
        )
        training.train(configuration, home / shape, progress=QUIET)
        export(home / shape, home / f"{shape}-hf", progress=QUIET)
    return {shape: (home / shape, home / f"{shape}-hf") for shape in SHAPES}


@pytest.fixture
def folder(runs_and_folders, tmp_path) -> Path:
    """A copy to break."""
    shutil.copytree(runs_and_folders["grouped_query"][1], tmp_path / "hf")
    return tmp_path / "hf"


def change(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_round_trip_gives_the_same_bits(runs_and_folders, tmp_path, shape, capsys):
    run, exported = runs_and_folders[shape]
    imported = import_(exported, tmp_path / "run", progress=QUIET)
    assert imported.agreement.error <= imported.agreement.allowed
    before, after = load(run), load(tmp_path / "run")
    ours, theirs = weights(before.model), weights(after.model)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert after.configuration.model == before.configuration.model
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    again = export(tmp_path / "run", tmp_path / "again", progress=QUIET).folder
    assert (again / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (exported / "tokenizer.json").read_bytes()
    assert (again / "config.json").read_bytes() == (exported / "config.json").read_bytes()
    texts = []
    for one in (run, tmp_path / "run"):
        generate(one, prompt=("the cat",), max_new_tokens=20, quiet=True)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_what_transformers_wrote_itself_in_bfloat16_and_shards(folder, tmp_path):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).bfloat16()
    theirs.save_pretrained(tmp_path / "own", max_shard_size="10KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "own" / name)
    assert (tmp_path / "own" / "model.safetensors.index.json").is_file()
    import_(tmp_path / "own", tmp_path / "run", progress=QUIET)
    found = weights(load(tmp_path / "run").model)["layers.1.ffn.w2.weight"]
    assert torch.equal(found, theirs.model.layers[1].mlp.down_proj.weight.float())
    assert found.dtype == torch.float32


def test_other_logits_leave_nothing(folder, tmp_path, monkeypatch):
    from cs336_registry.pipeline import llama

    monkeypatch.setattr(llama, "pairs", lambda weight, heads: weight)
    with pytest.raises(ValueError, match="transformers computes other logits"):
        import_(folder, tmp_path / "run", progress=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"model_type": "mistral"}, "model_type = 'mistral'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = "),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type = 'llama3'"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06 .every run here uses 1e-05"),
        ({"head_dim": 64}, "head_dim = 64"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True, "hidden_act": "relu"}, "hidden_act = 'relu'; attention_bias = True"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split()[0],
)
def test_what_can_not_be_expressed_is_refused_with_the_reason(folder, changes, reason):
    change(folder, **changes)
    with pytest.raises(ValueError, match=reason):
        model_settings(folder, json.loads((folder / "config.json").read_text()))


def test_version_4_configurations_are_read(folder):
    content = json.loads((folder / "config.json").read_text())
    del content["rope_parameters"], content["head_dim"]
    assert model_settings(folder, content | {"rope_theta": 123.0, "rope_scaling": None})["rope_theta"] == 123.0


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named_and_nothing_is_left(folder, tmp_path, missing):
    (folder / missing).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=missing) as error:
        import_(folder, tmp_path / "run", progress=QUIET)
    assert ("is a pickle, which is not read" in str(error.value)) == (missing == "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_damaged_or_foreign_weights(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or cut short"):
        read_weights(folder)
    path.write_bytes(whole)
    state = load_file(path)
    state["model.layers.0.self_attn.q_proj.bias"] = state.pop("model.norm.weight")
    save_file(state, path)
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\], not known \['model.layers.0.*bias'\]"):
        import_(folder, tmp_path / "run", progress=QUIET)
    path.write_bytes(whole)
    change(folder, intermediate_size=33)
    with pytest.raises(ValueError, match=r"ffn.w1.weight has shape \(32, 16\), config.json makes it \(33, 16\)"):
        import_(folder, tmp_path / "run", progress=QUIET)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(ValueError, match="names files outside"):
        read_weights(folder)


def test_an_end_of_text_that_the_tokenizer_lacks(folder, tmp_path):
    change(folder, eos_token_id=9999)
    with pytest.raises(ValueError, match=r"eos_token_id = 9999 is no special token of tokenizer.json"):
        import_(folder, tmp_path / "run", progress=QUIET)


def test_a_taken_name(folder, tmp_path):
    with pytest.raises(FileExistsError, match="exists already"):
        import_(folder, folder, progress=QUIET)
