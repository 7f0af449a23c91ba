"""What can go wrong in a run, apart from bad configurations. Each message says what is kept and what to type next."""

from __future__ import annotations

from ..errors import RegistryError


class RunError(RegistryError, RuntimeError):
    """A run that can't start, continue or finish; what was saved before is untouched."""


class DivergedError(RunError):
    """The loss left all bounds: the run's result, where divergence is what is looked for."""


class MismatchError(RegistryError, ValueError):
    """Files that do not belong together: tokens of another tokenizer, a checkpoint of another configuration."""
