"""`cs336 explain`: the dry run of a choice."""

from __future__ import annotations


def explain(
    component: str,
    /,
    *,
    device: str | None = None,
    dtype: str | None = None,
    backend: str | None = None,
    gradient: bool = False,
    compile: bool = False,
) -> int:
    """Say which backend would serve a component, who decided it, and why not another.

    Examples: `cs336 explain attention --device cuda --dtype bfloat16`, `cs336 explain transformer_lm --backend triton`.

    Parameters
    ----------
    component
        The component's name; `cs336 components` lists them.
    device
        The device it would run on, such as cpu or cuda.
    dtype
        The floating type it would run in, such as bfloat16.
    backend
        A selector that goes before every other layer, such as "triton,adamw=torch".
    gradient
        Ask for an implementation that computes gradients.
    compile
        Ask for an implementation that traces under torch.compile.
    """
    import cs336_registry as registry

    wanted = {"gradient": gradient or None, "compile": compile or None}
    print(registry.explain(component, device=device, dtype=dtype, backend=backend, **wanted))
    return 0
