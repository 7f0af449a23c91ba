"""Calling compiled kernels from Python through ctypes, which releases the interpreter lock."""

from __future__ import annotations

import ctypes
import itertools
from functools import cache
from typing import TYPE_CHECKING, Any

from .blocks import DTYPES
from .kernel_list import Kernel

if TYPE_CHECKING:
    import numpy as np


class CompiledFunction:
    """A Python function over a compiled one: status = f(&values), where `values` are those of numba's calling
    convention: &result, &error, then the arguments, an array as seven or nine values: owner, parent, items, item size,
    data, shape, strides."""

    def __init__(self, name: str, address: int, kernel: Kernel) -> None:
        self.name = name
        self.wanted = [(argument.partition("[")[0], argument.count("[")) for argument in kernel.arguments]
        sizes = [5 + 2 * dimensions if dimensions else 1 for _, dimensions in self.wanted]
        self.places = list(itertools.accumulate(sizes, initial=2))
        self.function = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)(address)

    def __call__(self, *arguments: Any) -> int:
        return RepeatedCalls(self)(*arguments)


class RepeatedCalls:
    """A compiled function for one thread that calls it again and again with mostly the same arrays, which are looked
    into once."""

    def __init__(self, function: CompiledFunction) -> None:
        self.function = function
        self.before: list[Any] = [None] * len(function.wanted)
        self.values = (ctypes.c_int64 * function.places[-1])()
        self.result, self.error = ctypes.c_int64(0), ctypes.c_void_p(0)
        self.values[0], self.values[1] = ctypes.addressof(self.result), ctypes.addressof(self.error)
        self.address = ctypes.addressof(self.values)

    def __call__(self, *arguments: Any) -> int:
        before, function = self.before, self.function
        for index, (value, last) in enumerate(zip(arguments, before, strict=True)):
            if value is not last:
                place, (dtype, dimensions) = function.places[index], function.wanted[index]
                flat = _array_arguments(value, dtype, dimensions) if dimensions else [value]
                self.values[place : place + len(flat)] = flat
                before[index] = value
        if function.function(self.address) != 0:
            raise RuntimeError(f"the compiled kernel {function.name} failed")
        return self.result.value

    def forget(self, array: Any) -> None:
        """Hold on to an argument no longer, since it would not be freed."""
        self.before = [None if value is array else value for value in self.before]


_Start = ctypes.c_char * 0
"""What a block begins with, also where it is empty."""


def _array_arguments(array: np.ndarray | memoryview, dtype: str, dimensions: int) -> list[Any]:
    is_view = isinstance(array, memoryview)
    found = DTYPES.get(array.format, array.format) if is_view else _name(array.dtype)
    if found != dtype or array.ndim != dimensions or not (array.c_contiguous if is_view else array.flags.c_contiguous):
        raise TypeError(f"expected a contiguous {dimensions}-D {dtype} array, got {array.ndim}-D {found}")
    address = ctypes.addressof(_Start.from_buffer(array)) if is_view else array.ctypes.data
    return [0, 0, array.nbytes // array.itemsize, array.itemsize, address, *array.shape, *array.strides]


@cache
def _name(dtype: np.dtype) -> str:
    """numpy makes the name anew each time, which takes longer than all else here."""
    return dtype.name
