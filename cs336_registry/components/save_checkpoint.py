"""Writing a checkpoint. What a checkpoint holds is decided here, so that every backend reads every other's files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload

if TYPE_CHECKING:
    import torch

FORMAT = "cs336_registry.checkpoint"
VERSION = 1


def save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike[str] | IO[bytes],
) -> None:
    """Write the states of `model` and `optimizer` and the iteration count to `out`, for `load_checkpoint`.

    iteration: steps done, a non-negative int. out: a path (folders on the way are made; the file appears whole or not
    at all, whatever interrupts the writing) or a binary file object. A module wrapped by torch.compile is saved under
    the names of the original. The content is `torch.save` of tensors and plain values alone: a header with the format's
    name and version, which backend served each component, and the three parts.
    Raises ValueError for a negative iteration, TypeError for an iteration that is not an int or an `out` that is
    neither a path nor a binary file, IsADirectoryError where `out` is a folder.
    Source: https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html.
    """
    raise NotImplementedError


def check(iteration: int, out: Any) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    if not isinstance(iteration, int) or isinstance(iteration, bool):
        raise TypeError(f"save_checkpoint: iteration is {iteration!r}: it must be an int (the number of steps done)")
    if iteration < 0:
        raise ValueError(f"save_checkpoint: iteration is {iteration}: it must not be negative")
    if is_path(out):
        if os.path.isdir(out):
            raise IsADirectoryError(f"save_checkpoint: out is {os.fspath(out)!r}, a folder: name a file in it")
    elif not callable(getattr(out, "write", None)):
        raise TypeError(f"save_checkpoint: out is a {type(out).__name__}: pass a path or a binary file object")


def is_path(place: Any) -> bool:
    return isinstance(place, str | os.PathLike)


def payload(model: torch.nn.Module, optimizer: torch.optim.Optimizer, iteration: int) -> dict[str, Any]:
    """What a checkpoint holds: tensors and plain values, nothing that needs unpickling of code."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "served_by": served_by(),
        "iteration": iteration,
        "model": uncompiled(model).state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def served_by() -> dict[str, dict[str, str]]:
    """The backend of every component under the present choice, for whoever asks later what made these weights."""
    from .. import registry

    found = {}
    for name in registry.components():
        try:
            decision = registry.resolve(name)
        except Exception:
            # What can't be chosen had no part in the weights, and a broken plugin must not cost a checkpoint.
            continue
        found[name] = {"backend": decision.backend, "fingerprint": decision.fingerprint}
    return found


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module that torch.compile wrapped, so that names are the same with and without it."""
    return getattr(model, "_orig_mod", model)


def example(make: ArgumentMaker, *, steps: int = 2, kind: str = "adamw") -> tuple[Any, Any]:
    """A small model and its optimizer after some steps on seeded data."""
    import torch

    width = 6
    model = torch.nn.Sequential(
        torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 4), torch.nn.Linear(4, width)
    )
    model[3].weight = model[0].weight  # Tied, as embeddings often are: (width, 4) both ways.
    model[2].bias.requires_grad_(False)
    model = model.to(make.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(make.normal(*parameter.shape, scale=0.5))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "adamw":
        optimizer: Any = torch.optim.AdamW(parameters, lr=0.05)
    else:
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    for _ in range(steps):
        train_step(model, optimizer, make.normal(8, 4), make.normal(8, width))
    return model, optimizer


def train_step(model: Any, optimizer: Any, inputs: Any, wanted: Any) -> float:
    optimizer.zero_grad()
    loss = ((model(inputs) - wanted) ** 2).mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    import io

    sizes = case.sizes
    model, optimizer = example(make, steps=sizes.get("steps", 2), kind=sizes.get("optimizer", "adamw"))
    out: Any = io.BytesIO()
    if sizes["out"] != "file":
        out = sizes["out"](folder_of(make) / sizes.get("name", "checkpoint.pt"))
        if sizes.get("existing"):
            Path(out).write_bytes(b"an older checkpoint")
    return {"model": model, "optimizer": optimizer, "iteration": sizes.get("iteration", 7), "out": out}


def observe(implementation: Callable[..., Any], arguments: Arguments) -> Any:
    """What anybody who opens the file finds there, and that no other file was left beside it."""
    import torch

    out = arguments["out"]
    implementation(**arguments)
    if is_path(out):
        left = sorted(path.name for path in Path(out).parent.iterdir())
        assert left == [Path(out).name], f"beside the checkpoint were left: {left}"
    else:
        out.seek(0)
    found = torch.load(out, weights_only=True)
    return {name: found[name] for name in ("format", "version", "served_by", "iteration", "model", "optimizer")}


def folder_of(make: ArgumentMaker) -> Path:
    if make.folder is None:
        raise ValueError("this contract writes files: pass folder=tmp_path")
    return make.folder


def oracle(model: torch.nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out: Any) -> None:
    import torch

    if is_path(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    torch.save(payload(model, optimizer, iteration), out)


def _model_and_optimizer(make: ArgumentMaker) -> Arguments:
    model, optimizer = example(make, steps=1)
    return {"model": model, "optimizer": optimizer}


def an_interrupted_write_leaves_the_old_file(save_checkpoint, make: ArgumentMaker) -> None:
    import torch

    model, optimizer = example(make)
    folder = folder_of(make)
    path = folder / "checkpoint.pt"
    save_checkpoint(model, optimizer, 1, path)
    before = path.read_bytes()

    class Interrupted(torch.nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {"weight": torch.ones(3), "bad": Unwritable()}

    try:
        save_checkpoint(Interrupted(), optimizer, 2, path)
    except RuntimeError as error:
        assert "disk full" in str(error)
    else:
        raise AssertionError("an error while writing was swallowed")
    assert path.read_bytes() == before, "a failed save changed the old checkpoint"
    assert [entry.name for entry in folder.iterdir()] == [path.name], "a failed save left files behind"


class Unwritable:
    """Fails when it is pickled, as a disk does that fills up half-way."""

    def __reduce__(self) -> Any:
        raise RuntimeError("disk full")


def saving_changes_nothing(save_checkpoint, make: ArgumentMaker) -> None:
    import copy
    import io

    model, optimizer = example(make)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    save_checkpoint(model, optimizer, 3, io.BytesIO())
    assert str((model.state_dict(), optimizer.state_dict())) == str(before), "saving changed the model or the optimizer"


contract = Component(
    signature=save_checkpoint,
    kind="io",
    summary="model, optimizer and iteration to a file, whole or not at all",
    formula="load(save(state)) = state",
    paper="https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    exact=True,
    mutates=("out",),
    cases=(
        Case(id="path", sizes={"out": Path}),
        Case(id="text_path", sizes={"out": str}),
        Case(id="file_object", sizes={"out": "file"}),
        Case(id="existing_file", sizes={"out": Path, "existing": True}),
        Case(id="new_folder", sizes={"out": Path, "name": "runs/one/checkpoint.pt"}),
        Case(id="fresh_optimizer", sizes={"out": "file", "steps": 0, "iteration": 0}),
        Case(id="momentum_groups", sizes={"out": Path, "optimizer": "sgd"}),
    ),
    error_cases=(
        ErrorCase(
            id="negative_iteration",
            arguments=lambda make: {**_model_and_optimizer(make), "iteration": -1, "out": folder_of(make) / "never.pt"},
            match="iteration is -1: it must not be negative",
        ),
        ErrorCase(
            id="iteration_is_not_a_number",
            arguments=lambda make: {
                **_model_and_optimizer(make),
                "iteration": 1.5,
                "out": folder_of(make) / "never.pt",
            },
            error=TypeError,
            match="iteration is 1.5: it must be an int",
        ),
        ErrorCase(
            id="folder",
            arguments=lambda make: {**_model_and_optimizer(make), "iteration": 1, "out": folder_of(make)},
            error=IsADirectoryError,
            match="a folder: name a file in it",
        ),
        ErrorCase(
            id="nowhere",
            arguments=lambda make: {**_model_and_optimizer(make), "iteration": 1, "out": 3},
            error=TypeError,
            match="out is a int: pass a path or a binary file object",
        ),
    ),
    laws=(
        Law(
            id="atomic",
            statement="a save that fails leaves the older file and nothing else",
            check=an_interrupted_write_leaves_the_old_file,
        ),
        Law(id="reading_only", statement="saving changes neither model nor optimizer", check=saving_changes_nothing),
    ),
    workloads=(
        Workload(id="small_to_disk", sizes={"out": Path}),
        Workload(id="small_to_memory", sizes={"out": "file"}),
    ),
    adapter="run_save_checkpoint",
)
