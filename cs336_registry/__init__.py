"""A registry of the parts of small language models: one contract per component, interchangeable backends.

    import cs336_registry as registry
    attention = registry.get("attention")            # the callable itself, chosen once
    with registry.use("triton,adamw=torch"): ...     # a scoped preference and a demand
    print(registry.explain("attention", device="cuda", dtype="bfloat16"))

Importing this imports neither torch nor triton nor numba nor numpy.
"""

# The contracts' package is imported first, so that the function `components()` keeps the name afterwards.
from . import components
from .registry import (
    backends,
    components,  # noqa: F811
    contract,
    explain,
    get,
    operations,
    refresh,
    resolve,
    set_command_line,
    use,
)

__all__ = [
    "backends",
    "components",
    "contract",
    "explain",
    "get",
    "operations",
    "refresh",
    "resolve",
    "set_command_line",
    "use",
]
