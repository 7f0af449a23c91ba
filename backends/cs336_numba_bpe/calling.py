"""Calling compiled kernels from Python through ctypes, which releases the interpreter lock."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from .blocks import DTYPES
from .kernel_list import Kernel

if TYPE_CHECKING:
    import numpy as np


def python_function(name: str, address: int, kernel: Kernel) -> Callable[..., int]:
    """A Python function over a compiled one, in numba's calling convention: status = f(&result, &error, arguments...),
    where an array is seven or nine values: owner, parent, items, item size, data, shape, strides."""
    types: list[Any] = [ctypes.c_void_p, ctypes.c_void_p]
    for argument in kernel.arguments:
        dimensions = argument.count("[")
        types += [ctypes.c_int64] if not dimensions else [ctypes.c_void_p] * 2 + [ctypes.c_int64] * (3 + 2 * dimensions)
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *types)(address)
    wanted = [(argument.partition("[")[0], argument.count("[")) for argument in kernel.arguments]

    def call(*arguments: Any) -> int:
        result, error = ctypes.c_int64(0), ctypes.c_void_p(0)
        flat: list[Any] = []
        for value, (dtype, dimensions) in zip(arguments, wanted, strict=True):
            if dimensions:
                flat += _array_arguments(value, dtype, dimensions)
            else:
                flat.append(value)
        if function(ctypes.addressof(result), ctypes.addressof(error), *flat) != 0:
            raise RuntimeError(f"the compiled kernel {name} failed")
        return result.value

    return call


_Start = ctypes.c_char * 0
"""What a block begins with, also where it is empty."""


def _array_arguments(array: np.ndarray | memoryview, dtype: str, dimensions: int) -> list[Any]:
    is_view = isinstance(array, memoryview)
    found = DTYPES.get(array.format, array.format) if is_view else _name(array.dtype)
    if found != dtype or array.ndim != dimensions or not (array.c_contiguous if is_view else array.flags.c_contiguous):
        raise TypeError(f"expected a contiguous {dimensions}-D {dtype} array, got {array.ndim}-D {found}")
    address = ctypes.addressof(_Start.from_buffer(array)) if is_view else array.ctypes.data
    return [None, None, array.nbytes // array.itemsize, array.itemsize, address, *array.shape, *array.strides]


@cache
def _name(dtype: np.dtype) -> str:
    """numpy makes the name anew each time, which takes longer than all else here."""
    return dtype.name
