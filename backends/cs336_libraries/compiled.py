"""torch.compile over the textbook: what PyTorch's own compiler makes of the same lines."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from cs336_registry.plugin import Backend, Implementation, hookimpl

COMPONENTS = ("rmsnorm", "add_rmsnorm", "silu", "swiglu", "rope", "softmax", "cross_entropy")


@hookimpl
def cs336_backend() -> Backend:
    claims = [
        Implementation(
            component=name,
            target=f"{__name__}:{name}",
            dtypes=("float32", "bfloat16"),
            devices=("cpu", "cuda"),
            gradient=True,
        )
        for name in COMPONENTS
    ]
    return Backend(
        name="compiled",
        summary="torch.compile over the reference",
        requires=("torch",),
        cure="pip install torch",
        implementations=tuple(claims),
    )


def cross_entropy(logits, targets, *, reduction="mean"):
    """Looking at the targets can't be traced, so it comes first."""
    from cs336_registry.components.cross_entropy import check

    check(logits, targets, reduction)
    return _compiled("cross_entropy")(logits, targets, reduction=reduction)


@cache
def _compiled(name: str) -> Callable[..., Any]:
    """The reference's function, compiled; sizes are symbols, so that new ones do not recompile."""
    import torch

    return torch.compile(getattr(importlib.import_module(f"cs336_reference.{name}"), name), dynamic=True)


def __getattr__(name: str) -> Callable[..., Any]:
    """The other components, compiled when first asked for."""
    if name not in COMPONENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _compiled(name)
