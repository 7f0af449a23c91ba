"""Area "serialization": a resumed run equals an uninterrupted one, and nothing is loaded by halves."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

from .support import normal


class TwoLayers(torch.nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, width), torch.nn.Linear(width, 3)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def fresh(seed=0, width=8):
    model = TwoLayers(width)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + index))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = (model(normal(5, 4, seed=step)) - normal(5, 3, seed=step + 100)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("place", ["file_object", "path", "text_path"])
def test_round_trip_resumes_the_run(implementation_of, tmp_path, place):
    save, load = implementation_of("save_checkpoint"), implementation_of("load_checkpoint")
    out = {"file_object": io.BytesIO(), "path": tmp_path / "run" / "last.pt", "text_path": str(tmp_path / "last.pt")}[
        place
    ]
    model, optimizer = fresh()
    train(model, optimizer, range(10))
    save(model, optimizer, 10, out)
    expected = train(model, optimizer, range(10, 20))
    if place == "file_object":
        out.seek(0)
    other, other_optimizer = fresh(seed=50)
    iteration = load(out, other, other_optimizer)
    assert iteration == 10
    assert train(other, other_optimizer, range(iteration, 20)) == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_what_is_loaded_is_a_copy(implementation_of, tmp_path):
    """Neither a later save over the file nor training changes what another model was loaded with."""
    save, load = implementation_of("save_checkpoint"), implementation_of("load_checkpoint")
    path = tmp_path / "last.pt"
    model, optimizer = fresh()
    train(model, optimizer, range(3))
    save(model, optimizer, 3, path)
    one, one_optimizer = fresh(seed=50)
    load(path, one, one_optimizer)
    before = str((one.state_dict(), one_optimizer.state_dict()))
    path.write_bytes(b"\0" * path.stat().st_size)
    train(model, optimizer, range(3))
    assert str((one.state_dict(), one_optimizer.state_dict())) == before


def test_backends_read_each_others_checkpoints(implementation_of, tmp_path):
    from cs336_reference.load_checkpoint import load_checkpoint
    from cs336_reference.save_checkpoint import save_checkpoint

    pairs = [
        (save_checkpoint, implementation_of("load_checkpoint")),
        (implementation_of("save_checkpoint"), load_checkpoint),
    ]
    for index, (save, load) in enumerate(pairs):
        model, optimizer = fresh()
        train(model, optimizer, range(2))
        save(model, optimizer, index, tmp_path / "last.pt")
        other, other_optimizer = fresh(seed=50)
        assert load(tmp_path / "last.pt", other, other_optimizer) == index
        assert str(other.state_dict()) == str(model.state_dict())


def test_the_header_says_what_served(implementation_of):
    out = io.BytesIO()
    implementation_of("save_checkpoint")(*fresh(), 1, out)
    out.seek(0)
    content = torch.load(out, weights_only=True)
    assert (content["format"], content["version"]) == ("cs336_registry.checkpoint", 1)
    assert content["served_by"]["rmsnorm"]["backend"] == "reference"
    assert len(content["served_by"]["rmsnorm"]["fingerprint"]) == 12


def test_a_compiled_model_is_saved_under_plain_names(implementation_of, tmp_path):
    model, optimizer = fresh()
    implementation_of("save_checkpoint")(torch.compile(model, backend="eager"), optimizer, 1, tmp_path / "last.pt")
    other, other_optimizer = fresh(seed=50)
    assert implementation_of("load_checkpoint")(tmp_path / "last.pt", other, other_optimizer) == 1
    assert torch.equal(other.first.weight, model.first.weight)


def test_a_model_of_another_size_is_left_alone(implementation_of, tmp_path):
    implementation_of("save_checkpoint")(*fresh(), 1, tmp_path / "last.pt")
    model, optimizer = fresh(seed=50, width=9)
    before = str(model.state_dict())
    with pytest.raises(ValueError, match=r"first.weight has shape \(8, 4\), the model has \(9, 4\)"):
        implementation_of("load_checkpoint")(tmp_path / "last.pt", model, optimizer)
    assert str(model.state_dict()) == before


def test_a_pickle_that_runs_code_is_refused(implementation_of, tmp_path):
    class Touches:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Touches()))
    torch.save({"format": Touches()}, tmp_path / "worse.pt")
    for name in ("bad.pt", "worse.pt"):
        with pytest.raises(ValueError, match="is no checkpoint or is cut short"):
            implementation_of("load_checkpoint")(tmp_path / name, *fresh())
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_every_cut_is_noticed(implementation_of, tmp_path, share):
    path = tmp_path / "last.pt"
    implementation_of("save_checkpoint")(*fresh(), 1, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    model, optimizer = fresh(seed=50)
    before = str(model.state_dict())
    with pytest.raises(ValueError, match="is no checkpoint or is cut short"):
        implementation_of("load_checkpoint")(path, model, optimizer)
    assert str(model.state_dict()) == before


def test_a_missing_file_is_named(implementation_of, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*none\.pt'"):
        implementation_of("load_checkpoint")(tmp_path / "none.pt", *fresh())
