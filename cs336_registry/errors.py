"""Errors of the registry. Each message says what was asked, what was found, what exists and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RegistryError(Exception):
    """Anything that goes wrong while choosing or loading a backend."""


class UnknownNameError(RegistryError, LookupError):
    """A component or backend that does not exist."""

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}: {suggestion(str(name), known)}")


class SelectorError(RegistryError, ValueError):
    """A selector that does not follow `[component=]backend[!|?]`, separated by commas."""


class ConfigurationError(RegistryError, ValueError):
    """An environment variable or a [tool.cs336] table that can't be read."""


class UnavailableError(RegistryError, RuntimeError):
    """A demanded backend that can't serve the request here, with every candidate's reason."""


class ContractError(RegistryError, TypeError):
    """A plugin or an implementation that does not keep the contract it claims."""


class TracingError(RegistryError, RuntimeError):
    """`registry.get` called while torch.compile traces."""


class FallbackWarning(UserWarning):
    """A preferred backend could not serve a component, and another one does."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """A closest-match hint and the list of what exists."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(options) or 'none'}"
