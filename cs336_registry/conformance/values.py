"""Walking through arguments and results: nested dicts, lists and tuples of tensors, arrays or anything else.

Text components must be judged without PyTorch: a process that has not imported torch holds no tensor, so `sys.modules`
is asked and nothing is imported.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

Layout = Literal["transposed", "padded_rows", "every_second"]
LAYOUTS: tuple[Layout, ...] = ("transposed", "padded_rows", "every_second")


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_floating(value: Any) -> bool:
    return is_tensor(value) and value.dtype.is_floating_point


def is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, leaf) of everything inside `value`, in order; the path reads like the Python that reaches the leaf."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting with `change(leaf)` for every leaf; a leaf that occurs twice (tied weights) stays one."""
    replaced: dict[int, tuple[Any, Any]] = {}

    def walk(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: walk(part) for key, part in item.items()}
        if type(item) in (list, tuple):
            return type(item)(walk(part) for part in item)
        if isinstance(item, tuple):
            return type(item)(*(walk(part) for part in item))
        if id(item) not in replaced:
            # The old leaf is kept beside the new one so that its id can't be reused meanwhile.
            replaced[id(item)] = (item, change(item))
        return replaced[id(item)][1]

    return walk(value)


def widened(value: Any) -> Any:
    """The same numbers in float64: tensors, parameters and their gradients, modules, arrays, dtypes as values."""
    return _converted(value, "float64")


def narrowed(value: Any) -> Any:
    """The numbers rounded to float32, likewise."""
    return _converted(value, "float32")


def _converted(value: Any, dtype_name: str) -> Any:
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")

    def convert(leaf: Any) -> Any:
        if is_floating(leaf):
            assert torch is not None
            dtype = getattr(torch, dtype_name)
            found = leaf.detach().to(dtype, copy=True)
            if isinstance(leaf, torch.nn.Parameter):
                found = torch.nn.Parameter(found, requires_grad=leaf.requires_grad)
            elif leaf.requires_grad:
                found.requires_grad_()
            if leaf.is_leaf and leaf.grad is not None:
                found.grad = leaf.grad.detach().to(dtype, copy=True)
            return found
        if is_module(leaf):
            assert torch is not None
            return copy.deepcopy(leaf).to(getattr(torch, dtype_name))
        if torch is not None and isinstance(leaf, torch.dtype) and leaf.is_floating_point:
            return getattr(torch, dtype_name)
        if is_array(leaf) and leaf.dtype.kind == "f":
            assert numpy is not None
            return leaf.astype(dtype_name)
        return leaf

    return rebuilt(value, convert)


def relaid(value: Any, layout: Layout) -> Any:
    """The same values, every plain tensor a view with unusual strides: what lies between its entries is poison."""
    torch = sys.modules.get("torch")
    if torch is None:
        return value

    def lay(leaf: Any) -> Any:
        if not is_tensor(leaf) or isinstance(leaf, torch.nn.Parameter) or leaf.requires_grad or leaf.ndim == 0:
            return leaf
        if layout == "transposed":
            return leaf.mT.contiguous().mT if leaf.ndim > 1 else leaf
        if layout == "padded_rows":
            return torch.cat([leaf, _poison_like(leaf[..., :1]).expand(*leaf.shape[:-1], 3)], dim=-1)[
                ..., : leaf.shape[-1]
            ]
        return torch.stack([leaf, _poison_like(leaf)], dim=-1)[..., 0]

    return rebuilt(value, lay)


def _poison_like(tensor: Any) -> Any:
    """NaN; for integers, which have none, the values in reverse: an id out of range would crash the process."""
    import torch

    return torch.full_like(tensor, float("nan")) if tensor.dtype.is_floating_point else tensor.flip(0)


def copied(value: Any) -> Any:
    """A copy to compare with later: tensors, arrays, files by content, plain values. Stateful objects become None."""

    def copy_leaf(leaf: Any) -> Any:
        if is_tensor(leaf):
            return leaf.detach().clone()
        if is_array(leaf):
            return leaf.copy()
        if isinstance(leaf, Path):
            return leaf.read_bytes() if leaf.is_file() else None
        if is_module(leaf):
            return {name: tensor.detach().clone() for name, tensor in leaf.state_dict().items()}
        return leaf if isinstance(leaf, str | bytes | int | float | bool) else None

    return rebuilt(value, copy_leaf)


def first_difference(found: Any, expected: Any, path: str = "result") -> str | None:
    """Where two values first differ, in a sentence, or None when they are equal; NaN equals NaN."""
    if is_tensor(expected) or is_tensor(found):
        return _tensor_difference(found, expected, path)
    if is_array(expected) or is_array(found):
        return _array_difference(found, expected, path)
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"{path} is a {type(found).__name__}, expected a {type(expected).__name__}"
        for key in expected:
            if key not in found:
                return f"{path} lacks {key!r} (expected {_short(expected[key])})"
            if (difference := first_difference(found[key], expected[key], f"{path}[{key!r}]")) is not None:
                return difference
        extra = next((key for key in found if key not in expected), None)
        return None if len(found) == len(expected) else f"{path} has {extra!r} that was not expected"
    if isinstance(expected, list | tuple):
        if type(found) is not type(expected):
            return f"{path} is a {type(found).__name__}, expected a {type(expected).__name__}"
        for index, (one, other) in enumerate(zip(found, expected, strict=False)):
            if (difference := first_difference(one, other, f"{path}[{index}]")) is not None:
                return difference
        return None if len(found) == len(expected) else f"{path} has {len(found)} entries, expected {len(expected)}"
    if isinstance(expected, float) and isinstance(found, float) and math.isnan(expected) and math.isnan(found):
        return None
    if type(found) is not type(expected):
        kinds = type(found).__name__, type(expected).__name__
        return f"{path} is {_short(found)} ({kinds[0]}), expected {_short(expected)} ({kinds[1]})"
    return None if found == expected else f"{path} is {_short(found)}, expected {_short(expected)}"


def _tensor_difference(found: Any, expected: Any, path: str) -> str | None:
    import torch

    if not (is_tensor(found) and is_tensor(expected)):
        return f"{path} is a {type(found).__name__}, expected a {type(expected).__name__}"
    if found.dtype != expected.dtype:
        return f"{path} has dtype {found.dtype}, expected {expected.dtype}"
    if found.shape != expected.shape:
        return f"{path} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    found, expected = found.detach().cpu(), expected.detach().cpu()
    same = found == expected
    if expected.dtype.is_floating_point:
        same = same | (torch.isnan(found) & torch.isnan(expected))
    if bool(same.all()):
        return None
    where = tuple(int(index) for index in (~same).nonzero()[0])
    one, other, count = found[where].item(), expected[where].item(), int((~same).sum())
    return f"{path}{list(where)} is {one}, expected {other} ({count} entries differ)"


def _array_difference(found: Any, expected: Any, path: str) -> str | None:
    import numpy as np

    if not (is_array(found) and is_array(expected)):
        return f"{path} is a {type(found).__name__}, expected a {type(expected).__name__}"
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{path} is {found.dtype}{found.shape}, expected {expected.dtype}{expected.shape}"
    equal = np.array_equal(found, expected, equal_nan=expected.dtype.kind in "fc")
    return None if equal else f"{path}: values differ"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}... ({len(text)} characters)"
