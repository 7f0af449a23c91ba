"""Wrong get_batch, save_checkpoint and load_checkpoint."""

from __future__ import annotations

import os

import numpy as np
import torch

from ...components.load_checkpoint import check_content, reading
from ...components.save_checkpoint import is_path, payload
from . import mutant, mutation


def starts(dataset, batch_size, context_length, generator):
    generator = np.random.default_rng() if generator is None else generator
    return generator.integers(0, len(dataset) - context_length, batch_size)


def cut(dataset, places, context_length, device, shift=1):
    """The windows at `places` and their targets: right, for the mutants to spoil."""

    def windows(offset):
        rows = [
            np.asarray(dataset[place + offset : place + offset + context_length]).astype(np.int64) for place in places
        ]
        return torch.from_numpy(np.stack(rows)).to(device)

    return windows(0), windows(shift)


@mutant("get_batch", "the targets are the inputs, not shifted")
def targets_not_shifted(dataset, batch_size, context_length, device="cpu", *, generator=None):
    return cut(dataset, starts(dataset, batch_size, context_length, generator), context_length, device, shift=0)


@mutant("get_batch", "the last possible window is never drawn")
def last_window_never_drawn(dataset, batch_size, context_length, device="cpu", *, generator=None):
    generator = np.random.default_rng() if generator is None else generator
    places = generator.integers(0, max(len(dataset) - context_length - 1, 1), batch_size)
    return cut(dataset, places, context_length, device)


@mutant("get_batch", "one generator with a fixed seed serves every call without one")
def always_the_same_batch(dataset, batch_size, context_length, device="cpu", *, generator=None):
    generator = np.random.default_rng(0) if generator is None else generator
    return cut(dataset, starts(dataset, batch_size, context_length, generator), context_length, device)


@mutant("get_batch", "the generator is ignored")
def generator_ignored(dataset, batch_size, context_length, device="cpu", *, generator=None):
    return cut(dataset, starts(dataset, batch_size, context_length, None), context_length, device)


@mutant("get_batch", "the windows follow one another instead of being random")
def windows_in_order(dataset, batch_size, context_length, device="cpu", *, generator=None):
    places = np.arange(batch_size) * context_length % (len(dataset) - context_length)
    return cut(dataset, places, context_length, device)


@mutant("get_batch", "tokens are int32")
def tokens_are_int32(dataset, batch_size, context_length, device="cpu", *, generator=None):
    inputs, targets = cut(dataset, starts(dataset, batch_size, context_length, generator), context_length, device)
    return inputs.int(), targets.int()


@mutant("get_batch", "ids pass through int16 and the upper half becomes negative")
def ids_through_int16(dataset, batch_size, context_length, device="cpu", *, generator=None):
    inputs, targets = cut(dataset, starts(dataset, batch_size, context_length, generator), context_length, device)
    return inputs.short().long(), targets.short().long()


@mutant("get_batch", "inputs and targets are two views of one tensor")
def results_share_memory(dataset, batch_size, context_length, device="cpu", *, generator=None):
    places = starts(dataset, batch_size, context_length, generator)
    rows = [np.asarray(dataset[place : place + context_length + 1]).astype(np.int64) for place in places]
    windows = torch.from_numpy(np.stack(rows)).to(device)
    return windows[:, :-1], windows[:, 1:]


@mutant("get_batch", "every row of a batch is the same window")
def rows_repeat_one_window(dataset, batch_size, context_length, device="cpu", *, generator=None):
    places = starts(dataset, batch_size, context_length, generator)
    return cut(dataset, [places[0]] * batch_size, context_length, device)


def _write(content, out):
    if is_path(out):
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    torch.save(content, out)


@mutant("save_checkpoint", "the optimizer's state is left out")
def optimizer_not_saved(model, optimizer, iteration, out):
    content = payload(model, optimizer, iteration)
    _write(content | {"optimizer": content["optimizer"] | {"state": {}}}, out)


@mutant("save_checkpoint", "only parameters are saved, not buffers")
def buffers_not_saved(model, optimizer, iteration, out):
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters(remove_duplicate=False)}
    _write(payload(model, optimizer, iteration) | {"model": parameters}, out)


@mutant("save_checkpoint", "the next iteration is saved")
def iteration_one_ahead(model, optimizer, iteration, out):
    _write(payload(model, optimizer, iteration + 1), out)


@mutant("save_checkpoint", "weights are saved in half precision")
def weights_saved_in_half(model, optimizer, iteration, out):
    content = payload(model, optimizer, iteration)
    weights = {name: t.half() if t.is_floating_point() else t for name, t in content["model"].items()}
    _write(content | {"model": weights}, out)


@mutant("save_checkpoint", "the file is written in place, so a crash leaves half of it")
def written_in_place(model, optimizer, iteration, out):
    _write(payload(model, optimizer, iteration), out)


@mutant("save_checkpoint", "the temporary file is left behind")
def temporary_file_left(model, optimizer, iteration, out):
    _write(payload(model, optimizer, iteration), out)
    if is_path(out):
        with open(f"{os.fspath(out)}.tmp", "wb") as file:
            file.write(b"half")


@mutant("save_checkpoint", "the model is moved to half precision while it is saved and stays so")
def model_changed_by_saving(model, optimizer, iteration, out):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    _write(payload(model, optimizer, iteration), out)


@mutation("save_checkpoint", "the optimizer's groups, with their learning rates, are saved as they were at first")
def learning_rates_not_saved(textbook):
    def save_checkpoint(model, optimizer, iteration, out):
        content = payload(model, optimizer, iteration)
        groups = [group | {"lr": optimizer.defaults["lr"]} for group in content["optimizer"]["param_groups"]]
        _write(content | {"optimizer": content["optimizer"] | {"param_groups": groups}}, out)

    return save_checkpoint


def _read(src):
    return torch.load(src, weights_only=True)


@mutant("load_checkpoint", "the optimizer is not loaded")
def optimizer_not_loaded(src, model, optimizer):
    content = _read(src)
    model.load_state_dict(content["model"])
    return content["iteration"]


@mutant("load_checkpoint", "weights that do not fit are passed over", groups=("law",))
def misfits_passed_over(src, model, optimizer):
    with reading(src):
        content = _read(src)
        own = model.state_dict()
        saved = {name: tensor for name, tensor in content["model"].items() if name in own}
        fitting = {name: tensor for name, tensor in saved.items() if own[name].shape == tensor.shape}
        check_content(content | {"model": own | fitting}, src, model, optimizer)
    model.load_state_dict(fitting, strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return content["iteration"]


@mutant("load_checkpoint", "the iteration is returned as a tensor")
def iteration_is_a_tensor(src, model, optimizer):
    content = _read(src)
    model.load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return torch.tensor(content["iteration"])


@mutant("load_checkpoint", "training starts again at iteration 0")
def iteration_forgotten(src, model, optimizer):
    content = _read(src)
    model.load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return 0


@mutant("load_checkpoint", "parameters are loaded, buffers are not")
def buffers_not_loaded(src, model, optimizer):
    content = _read(src)
    buffers = {name for name, _ in model.named_buffers()}
    model.load_state_dict({n: t for n, t in content["model"].items() if n not in buffers}, strict=False)
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return content["iteration"]


@mutant("load_checkpoint", "the file is unpickled: whatever code it holds is run", groups=("law",))
def code_in_the_file_is_run(src, model, optimizer):
    with reading(src):
        content = torch.load(src, weights_only=False)
    check_content(content, src, model, optimizer)
    model.load_state_dict(content["model"])
    if optimizer is not None:
        optimizer.load_state_dict(content["optimizer"])
    return content["iteration"]
