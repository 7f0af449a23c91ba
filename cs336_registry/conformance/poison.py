"""Uninitialised memory that can't be mistaken for a result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nan_in_uninitialised_memory() -> Iterator[None]:
    """While open, every floating tensor that `torch.empty` and its relatives hand out is filled with NaN.

    A kernel that forgets its last block usually passes its tests, because fresh memory often holds the right answer of the
    call before. A function mode sees the call however the function was imported, in `backward` too.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    uninitialised = {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.empty_permuted,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }

    class Poison(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in uninitialised and result.dtype.is_floating_point and result.device.type != "meta":
                result.detach().fill_(float("nan"))
            return result

    with Poison():
        yield
