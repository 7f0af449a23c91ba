"""Reading a checkpoint back into a model and an optimizer, after everything about it was found to fit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload
from .save_checkpoint import FORMAT, VERSION, example, folder_of, is_path, payload, train_step, uncompiled

if TYPE_CHECKING:
    import torch


def load_checkpoint(
    src: str | os.PathLike[str] | IO[bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> int:
    """Load what `save_checkpoint` wrote into `model` and `optimizer` and return the iteration count.

    src: a path, or a binary file object that stands at the start of a checkpoint. optimizer: None loads the model
    alone. Everything is checked before anything is loaded: where an error is raised, model and optimizer are as before.
    Tensors go to the devices and dtypes of the model's own. Only tensors and plain values are read
    (`weights_only=True`): no code in the file is run.
    Raises FileNotFoundError for a missing file and ValueError for a file that is cut short, is no checkpoint, is of a
    newer format, or does not fit the model or the optimizer.
    Source: https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html.
    """
    raise NotImplementedError


def check(src: Any) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    if is_path(src):
        if os.path.isdir(src):
            raise IsADirectoryError(f"load_checkpoint: src is {os.fspath(src)!r}, a folder: name a file in it")
        if not os.path.exists(src):
            raise FileNotFoundError(f"load_checkpoint: there is no file {os.fspath(src)!r}: check the path")
    elif not callable(getattr(src, "read", None)):
        raise TypeError(f"load_checkpoint: src is a {type(src).__name__}: pass a path or a binary file object")


@contextmanager
def reading(src: Any) -> Iterator[None]:
    """Turns whatever a reader says about a broken file into one sentence."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise ValueError(
            f"load_checkpoint: {describe(src)} is no checkpoint or is cut short ({reason}): use a file that "
            f"save_checkpoint wrote, and rewind file objects with seek(0)"
        ) from error


def describe(src: Any) -> str:
    return repr(os.fspath(src)) if is_path(src) else f"the {type(src).__name__}"


def check_content(content: Any, src: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse what was read where it is not a checkpoint or does not fit; called before anything is loaded."""
    where = f"load_checkpoint: {describe(src)}"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{where} is no checkpoint: it was not written by save_checkpoint (load it with torch.load)")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise ValueError(
            f"{where} has format version {content.get('version')!r}, this release reads up to {VERSION}: update it"
        )
    missing = [name for name in ("iteration", "model", "optimizer") if name not in content]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: it is damaged, use an older checkpoint")
    _check_model(content["model"], uncompiled(model), where)
    if optimizer is not None:
        _check_optimizer(content["optimizer"], optimizer, where)


def _check_model(saved: Any, model: torch.nn.Module, where: str) -> None:
    own = model.state_dict()
    missing, foreign = [name for name in own if name not in saved], [name for name in saved if name not in own]
    if missing or foreign:
        raise ValueError(
            f"{where} does not fit the model: it lacks {_names(missing)} and has {_names(foreign)} beyond it: build "
            f"the model with the sizes and the wrappers that it was saved with"
        )
    for name, tensor in own.items():
        if hasattr(tensor, "shape") and getattr(saved[name], "shape", None) != tensor.shape:
            raise ValueError(
                f"{where} does not fit the model: {name} has shape {tuple(getattr(saved[name], 'shape', ()))}, the "
                f"model has {tuple(tensor.shape)}: build the model with the sizes that it was saved with"
            )


def _check_optimizer(saved: Any, optimizer: torch.optim.Optimizer, where: str) -> None:
    counts = [len(group["params"]) for group in saved["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if counts != own:
        raise ValueError(
            f"{where} does not fit the optimizer: its groups have {counts} parameters, the optimizer's have {own}: "
            f"build the optimizer over the same parameter groups"
        )
    saved_ids = [index for group in saved["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(saved_ids, parameters, strict=True):
        for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            value = saved["state"].get(index, {}).get(name)
            if value is not None and value.shape != parameter.shape:
                raise ValueError(
                    f"{where} does not fit the optimizer: {name} of parameter {index} has shape {tuple(value.shape)}, "
                    f"the parameter has {tuple(parameter.shape)}: list the parameters in the order they were saved in"
                )


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "nothing"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _written(make: ArgumentMaker, how: str, **kind: Any) -> Any:
    """A checkpoint of a seeded example, as a file or a file object."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(payload(*example(make, **kind), 7), buffer)
    buffer.seek(0)
    return buffer if how == "file" else make.file(buffer.getvalue(), "checkpoint.pt")


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    kind = {"kind": sizes.get("optimizer", "adamw")}
    src = _written(make, sizes["src"], steps=sizes.get("steps", 2), **kind)
    model, optimizer = example(make, steps=sizes.get("own_steps", 0), **kind)
    src = str(src) if sizes["src"] == "text" else src
    return {"src": src, "model": model, "optimizer": None if sizes.get("model_only") else optimizer}


def observe(implementation: Callable[..., Any], arguments: Arguments) -> Any:
    """The iteration and everything the model and the optimizer hold afterwards."""
    iteration = implementation(**arguments)
    optimizer = arguments["optimizer"]
    return {
        "iteration": iteration,
        "model": dict(arguments["model"].state_dict()),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
    }


def oracle(src: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> int:
    import torch

    content = torch.load(src, weights_only=True)
    model.load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return content["iteration"]


def _fresh(make: ArgumentMaker) -> Arguments:
    model, optimizer = example(make, steps=1)
    return {"model": model, "optimizer": optimizer}


def _changed(make: ArgumentMaker, change: Callable[[dict[str, Any]], Any]) -> Any:
    """A checkpoint file whose content was changed."""
    import io

    import torch

    content = torch.load(_written(make, "file"), weights_only=True)
    change(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return make.file(buffer.getvalue(), "changed.pt")


class RunsCode:
    """Unpickling this would change the environment: a loader that does so runs strangers' code."""

    def __reduce__(self) -> Any:
        return exec, ("import os; os.environ['CHECKPOINT_RAN_CODE'] = 'yes'",)


BROKEN: dict[str, Callable[[ArgumentMaker], Any]] = {
    "cut_short": lambda make: make.file(_written(make, "file").getvalue()[:-700], "short.pt"),
    "empty": lambda make: make.file(b"", "empty.pt"),
    "not_a_checkpoint": lambda make: make.file("hello, this is text\n" * 40, "text.pt"),
    "runs_code": lambda make: _pickled(make, RunsCode()),
    "another_layout": lambda make: _changed(make, lambda content: content.pop("format")),
    "newer_version": lambda make: _changed(make, lambda content: content.update(version=VERSION + 1)),
    "lacks_a_part": lambda make: _changed(make, lambda content: content.pop("optimizer")),
    "lacks_a_weight": lambda make: _changed(make, lambda content: content["model"].pop("2.weight")),
    "foreign_weight": lambda make: _changed(
        make, lambda content: content["model"].update(extra=content["model"]["2.bias"])
    ),
    "other_shape": lambda make: _changed(
        make, lambda content: content["model"].update({"2.weight": content["model"]["2.weight"][:, :5]})
    ),
    "other_groups": lambda make: _changed(
        make, lambda content: content["optimizer"]["param_groups"][0]["params"].pop()
    ),
    "other_moments": lambda make: _changed(
        make, lambda content: content["optimizer"]["state"][0].update(exp_avg=content["model"]["2.bias"])
    ),
}


def _pickled(make: ArgumentMaker, value: Any) -> Any:
    import pickle

    return make.file(pickle.dumps(value), "pickled.pt")


def what_does_not_fit_changes_nothing(load_checkpoint, make: ArgumentMaker) -> None:
    import copy

    model, optimizer = example(make, steps=1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for name, write in BROKEN.items():
        try:
            load_checkpoint(write(make), model, optimizer)
        except ValueError:
            pass
        else:
            raise AssertionError(f"a broken checkpoint was accepted: {name}")
        assert str((model.state_dict(), optimizer.state_dict())) == str(before), (
            f"half of a checkpoint was loaded: {name}"
        )
    assert os.environ.pop("CHECKPOINT_RAN_CODE", None) is None, "code in the file was run"


def training_goes_on_the_same_way(load_checkpoint, make: ArgumentMaker) -> None:
    """Four steps in one go, or two, a checkpoint, and two more: the same bits."""
    import copy
    import io

    import torch

    model, optimizer = example(make)
    batches = [(make.normal(8, 4), make.normal(8, 6)) for _ in range(4)]
    for batch in batches[:2]:
        train_step(model, optimizer, *batch)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(payload(model, optimizer, 2)), buffer)
    losses = [train_step(model, optimizer, *batch) for batch in batches[2:]]
    buffer.seek(0)
    resumed, resumed_optimizer = example(make, steps=0)
    iteration = load_checkpoint(buffer, resumed, resumed_optimizer)
    assert iteration == 2 and type(iteration) is int
    again = [train_step(resumed, resumed_optimizer, *batch) for batch in batches[iteration:]]
    assert again == losses, f"the losses after resuming are {again}, in one go they are {losses}"
    assert resumed[0].weight is resumed[3].weight, "loading untied the tied weights"
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), f"{name} differs after resuming"


contract = Component(
    signature=load_checkpoint,
    kind="io",
    summary="a checkpoint back into model and optimizer, all or nothing",
    formula="load(save(state)) = state",
    paper="https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html",
    arguments=arguments,
    oracle=oracle,
    observe=observe,
    exact=True,
    mutates=("model", "optimizer"),
    cases=(
        Case(id="path", sizes={"src": "path"}),
        Case(id="text_path", sizes={"src": "text"}),
        Case(id="file_object", sizes={"src": "file"}),
        Case(id="into_a_trained_model", sizes={"src": "path", "own_steps": 3}),
        Case(id="fresh_optimizer", sizes={"src": "path", "steps": 0}),
        Case(id="momentum_groups", sizes={"src": "path", "optimizer": "sgd"}),
        Case(id="model_only", sizes={"src": "path", "model_only": True}),
    ),
    error_cases=(
        ErrorCase(
            id="missing_file",
            arguments=lambda make: {"src": folder_of(make) / "none.pt", **_fresh(make)},
            error=FileNotFoundError,
            match=r"there is no file '.*none.pt'",
        ),
        ErrorCase(
            id="folder",
            arguments=lambda make: {"src": folder_of(make), **_fresh(make)},
            error=IsADirectoryError,
            match="a folder: name a file in it",
        ),
        ErrorCase(
            id="nothing_readable",
            arguments=lambda make: {"src": 3, **_fresh(make)},
            error=TypeError,
            match="src is a int: pass a path or a binary file object",
        ),
        *(
            ErrorCase(id=id, arguments=lambda make, id=id: {"src": BROKEN[id](make), **_fresh(make)}, match=match)
            for id, match in (
                ("cut_short", "short.pt' is no checkpoint or is cut short"),
                ("empty", "empty.pt' is no checkpoint or is cut short"),
                ("not_a_checkpoint", "text.pt' is no checkpoint or is cut short"),
                ("runs_code", "pickled.pt' is no checkpoint or is cut short"),
                ("another_layout", "it was not written by save_checkpoint"),
                ("newer_version", f"format version {VERSION + 1}, this release reads up to {VERSION}"),
                ("lacks_a_part", "lacks optimizer: it is damaged"),
                ("lacks_a_weight", "it lacks 2.weight and has nothing beyond it"),
                ("foreign_weight", "it lacks nothing and has extra beyond it"),
                ("other_shape", r"2.weight has shape \(4, 5\), the model has \(4, 6\)"),
                ("other_groups", r"its groups have \[.*\] parameters, the optimizer's have"),
                ("other_moments", "exp_avg of parameter 0 has shape"),
            )
        ),
    ),
    laws=(
        Law(
            id="all_or_nothing",
            statement="a checkpoint that is refused changes nothing and runs no code",
            check=what_does_not_fit_changes_nothing,
        ),
        Law(id="resume", statement="a resumed run equals an uninterrupted one", check=training_goes_on_the_same_way),
    ),
    workloads=(
        Workload(id="small_from_disk", sizes={"src": "path"}),
        Workload(id="small_from_memory", sizes={"src": "file"}),
    ),
    adapter="run_load_checkpoint",
)
