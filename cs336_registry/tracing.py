"""Refusing to choose while torch.compile traces. Imported only then, so the registry stays free of torch.

An exception raised by traced code would only break the graph: the frame would run again uncompiled, slowly and
silently. Code under `comptime` runs in the compiler, where raising ends the compilation with our message.
"""

from __future__ import annotations

from typing import NoReturn

from torch._dynamo.comptime import comptime

from .errors import TracingError


def refuse(component: str) -> NoReturn:
    """Raise TracingError, from inside the compiler where there is one."""
    comptime(_raise)
    raise TracingError(f"registry.get({component!r}): {_MESSAGE}")


def _raise(context: object) -> NoReturn:
    raise TracingError(_MESSAGE)


_MESSAGE = (
    "registry.get was called while torch.compile traces. Choose the component before compiling "
    "(attention = registry.get('attention')) and call what you got inside"
)
