"""The checks that many contracts share: cheap enough for every call, and traceable by torch.compile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def require_floating(component: str, **tensors: Any) -> None:
    """Each of `tensors` must be a floating-point tensor."""
    import torch

    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{component}: {name} is a {type(tensor).__name__}: pass a torch.Tensor")
        if not tensor.dtype.is_floating_point:
            raise TypeError(
                f"{component}: {name} has dtype {tensor.dtype}: pass floating-point values ({name}.float())"
            )


def require_same_dtype(component: str, **tensors: Tensor) -> None:
    """All of `tensors` must have the dtype of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{component}: {name} has dtype {tensor.dtype} but {first_name} has {first.dtype}: convert one of them"
            )


def require_integer(component: str, **tensors: Any) -> None:
    """Each of `tensors` must be an integer tensor (booleans are not integers here)."""
    import torch

    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{component}: {name} is a {type(tensor).__name__}: pass a torch.Tensor of int64")
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
            raise TypeError(f"{component}: {name} has dtype {tensor.dtype}: pass integers ({name}.long())")


def require_in_range(component: str, name: str, tensor: Tensor, limit: int, meaning: str) -> None:
    """Every entry of `tensor` must be in [0, limit).

    Looking at the values would make a GPU wait and would break a compiled graph, so this looks on the CPU only; on a
    GPU an index outside the range is a device-side assertion, as in PyTorch.
    """
    import torch

    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in torch.aminmax(tensor))
    if smallest < 0 or largest >= limit:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"{component}: {name} contains {wrong}, outside 0..{limit - 1}: {meaning}")
