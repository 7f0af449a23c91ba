"""torch.compile over the textbook: what PyTorch's own compiler makes of the same lines."""

from __future__ import annotations

import importlib

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


def __getattr__(name: str):
    """The reference's function, compiled when first asked for; sizes are symbols, so that new ones do not recompile."""
    if name not in COMPONENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch

    textbook = getattr(importlib.import_module(f"cs336_reference.{name}"), name)
    globals()[name] = torch.compile(textbook, dynamic=True)
    return globals()[name]
