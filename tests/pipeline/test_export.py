"""Export to Hugging Face's Llama: what transformers loads must be the model, and nothing else may be written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cs336_registry.pipeline import llama, training
from cs336_registry.pipeline.configuration import ModelConfiguration
from cs336_registry.pipeline.export import _save, check_free, export, staged, staging_folder
from cs336_registry.pipeline.progress import Progress
from cs336_registry.pipeline.trained import load

from ..cli.typing_commands import typed
from .conftest import TINY
from .conftest import load as load_configuration

QUIET = Progress(quiet=True)
SHAPES = {
    "grouped_query": ("model.num_heads=4", "model.num_kv_heads=2", "model.num_layers=2"),
    "tied": ("model.tie_embeddings=true", "model.rope_theta=500.0"),
}


@pytest.fixture(scope="module")
def trained_run(corpus_path, tmp_path_factory):
    """trained_run("tied") is the folder of a run with that shape, trained for a few steps, once."""
    made: dict[str, Path] = {}

    def train(shape: str, *settings: str) -> Path:
        if shape not in made:
            configuration = load_configuration(
                "quickstart",
                [*TINY, f'data.train="{corpus_path}"', "training.steps=6", *SHAPES.get(shape, ()), *settings],
            )
            made[shape] = tmp_path_factory.mktemp("runs") / shape
            training.train(configuration, made[shape], progress=QUIET)
        return made[shape]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_transformers_computes_the_same_logits_and_ids(trained_run, tmp_path, shape):
    """Importing transformers takes most of the time."""
    import transformers

    run = trained_run(shape)
    exported = export(run, tmp_path / "hf", progress=QUIET)
    assert exported.agreement.error <= exported.agreement.allowed
    ours = load(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported.folder)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = torch.randint(280, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.model(ids), rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported.folder)
    text = "The cat sees<|endoftext|> a dog, 12 naïve ☃ trees\n\n"
    assert tokenizer.encode(text) == ours.tokenizer.tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert theirs.generation_config.eos_token_id == ours.tokenizer.end_of_text_id
    origin = json.loads((exported.folder / "cs336.json").read_text())
    assert origin["step"] == 6 and origin["logits"]["error"] == exported.agreement.error
    assert len({oct(path.stat().st_mode) for path in exported.folder.iterdir()}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["keys_not_permuted", "gate_and_up_swapped", "rope_theta", "eps"])
def test_a_folder_that_computes_something_else_is_never_written(trained_run, tmp_path, monkeypatch, fault):
    run = trained_run("grouped_query")
    right = llama.to_llama, llama.configuration

    def weights(state, settings):
        found = right[0](state, settings)
        for name in list(found):
            if fault == "keys_not_permuted" and "k_proj" in name:
                found[name] = llama.pairs(found[name], settings.num_kv_heads)
            if fault == "gate_and_up_swapped" and "gate_proj" in name:
                other = name.replace("gate", "up")
                found[name], found[other] = found[other], found[name]
        return found

    def configuration(settings, end):
        changed = {"rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}}
        return right[1](settings, end) | changed.get(fault, {}) | ({"rms_norm_eps": 2e-4} if fault == "eps" else {})

    monkeypatch.setattr(llama, "to_llama", weights)
    monkeypatch.setattr(llama, "configuration", configuration)
    with pytest.raises(ValueError, match="transformers computes other logits"):
        export(run, tmp_path / "hf", progress=QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"norm": "post"}, "norm = 'post' .Llama normalises what each sublayer reads"),
        ({"norm": "none"}, "norm = 'none'"),
        ({"position": "none"}, "position = 'none' .Llama rotates"),
        ({"ffn": "silu"}, "ffn = 'silu' .Llama's feed-forward network has a gate"),
        ({"ffn": "silu", "norm": "post"}, "norm = 'post' .*; ffn = 'silu'"),
    ],
)
def test_what_llama_can_not_express_is_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        llama.check_expressible(ModelConfiguration(**settings))


def test_an_ablated_run_is_refused_before_anything_is_written(trained_run, tmp_path):
    run = trained_run("ablated", "model.norm=post")
    with pytest.raises(ValueError, match="can't be written as Llama: norm = 'post'"):
        export(run, tmp_path / "hf", progress=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_reordered_within_each_head():
    rows = torch.arange(12)[:, None] * torch.ones(1, 3)
    assert llama.halves(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(llama.pairs(llama.halves(rows, 2), 2), rows)
    assert torch.equal(llama.pairs(llama.halves(rows, 3), 3), rows)


def test_bad_requests_say_what_to_do(trained_run, tmp_path):
    run = trained_run("tied")
    with pytest.raises(ValueError, match="no format 'gguf' for models: choose hf"):
        export(run, tmp_path / "hf", format="gguf", progress=QUIET)
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        export(tmp_path / "nothing", tmp_path / "hf", progress=QUIET)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint '3' in .*use last, best or a step of 5, 6"):
        load(run, checkpoint="3")
    assert load(run, checkpoint="5").step == 5
    (tmp_path / "taken").mkdir()
    check_free(tmp_path / "taken")
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="taken exists already: choose another --out"):
        export(run, tmp_path / "taken", progress=QUIET)
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(trained_run, tmp_path, monkeypatch, capsys):
    def full(state, path, metadata):
        Path(path).write_bytes(b"some of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    out = tmp_path / "hf"
    assert typed(capsys, "export", trained_run("tied"), "--out", out, "--quiet").failed_with(
        f"the disk is full while {out} is made: what was", "free some space and run the same command again"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_the_system_refuses_safetensors_is_an_error_of_the_system(tmp_path):
    resource = pytest.importorskip("resource", reason="limits are posix")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            _save({"weight": torch.zeros(1000)}, tmp_path / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(tmp_path / "model.safetensors")


def test_errors_name_files_where_they_would_have_been(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PermissionError) as raised, staged(Path("hf")) as staging:
        raise PermissionError(errno.EACCES, "not allowed", str(staging / "config.json"))
    assert raised.value.filename == str(tmp_path.resolve() / "hf" / "config.json")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed(tmp_path):
    (tmp_path / ".hf.1234.tmp").mkdir()
    (tmp_path / ".hf.1234.tmp" / "config.json").write_text("{")
    staging = staging_folder(tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == [staging.name] == [f".hf.{os.getpid()}.tmp"]


def test_another_tokenizer_than_the_trained_one_is_refused(trained_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained_run("tied"), run)
    state = next(run.glob("checkpoints/step-00000006/state.json"))
    state.write_text(state.read_text().replace(json.loads(state.read_text())["tokenizer"], "0" * 16))
    with pytest.raises(ValueError, match="was trained with tokenizer 0000000000000000"):
        load(run)
