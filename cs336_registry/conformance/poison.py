"""Uninitialised memory that can't be mistaken for a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"})


@contextmanager
def nan_in_uninitialised_memory() -> Iterator[None]:
    """While open, every floating tensor that `torch.empty` and its relatives hand out is filled with NaN.

    A kernel that forgets its last block usually passes its tests, because fresh memory often holds the right answer of
    the call before. A dispatch mode sees the call however the function was imported, and in the backward pass too
    (which a function mode does not: it is off while `backward` runs).
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Poison(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            if name in UNINITIALISED and result.dtype.is_floating_point and result.device.type != "meta":
                result.detach().fill_(float("nan"))
            return result

    with Poison():
        yield
