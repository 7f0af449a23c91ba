"""`cs336 explain`: the dry run of a choice."""

from __future__ import annotations

from typing import Any


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

    Ends with 1 where an error would be raised. Examples: `cs336 explain attention --device cuda --dtype bfloat16`,
    `cs336 explain transformer_lm --backend triton`.

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

    from ..errors import UnavailableError, UnknownNameError
    from ..plugin import DEVICES, DTYPES

    if device is not None and device.partition(":")[0] not in DEVICES:
        raise UnknownNameError("device", device, DEVICES)
    if dtype is not None and dtype.removeprefix("torch.") not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    wanted: dict[str, Any] = {"device": device, "dtype": dtype, "backend": backend}
    wanted |= {"gradient": gradient or None, "compile": compile or None}
    print(registry.explain(component, **wanted))
    try:
        registry.resolve(component, **wanted)
    except UnavailableError:
        return 1
    return 0
