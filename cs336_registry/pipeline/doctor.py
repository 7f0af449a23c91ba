"""What would go wrong here, found before it does: each finding says what was found and what to do.

examine(load("tinystories_17m")) holds this machine against a configuration; examine() looks at the machine alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .configuration import Configuration

Level = Literal["ok", "note", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """level: "problem" would make a run fail, "warning" may, a "note" is worth knowing. advice: what to do."""

    level: Level
    subject: str
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    configuration: Configuration | None = None, *, out: Path | None = None, canary_seconds: float = 180.0
) -> Iterable[Finding]:
    """All findings, as they are made. canary_seconds: how long the compiler may take; 0 leaves the canary out."""
    from . import doctor_configuration, doctor_machine

    home = out or Path("runs") / (configuration.name if configuration else "")
    checks: list[Callable[[], Iterable[Finding]]] = [
        doctor_machine.versions,
        doctor_machine.devices,
        doctor_machine.processors,
        doctor_machine.environment,
        doctor_machine.plugins,
        functools.partial(doctor_machine.compiler, configuration, canary_seconds),
    ]
    if configuration is None:
        checks.append(functools.partial(doctor_machine.space, home))
    else:
        checks += [
            functools.partial(check, configuration)
            for check in (doctor_configuration.components, doctor_configuration.data)
        ]
        checks.append(functools.partial(doctor_configuration.memory, configuration))
        checks.append(functools.partial(doctor_configuration.disk, configuration, home))
    for check in checks:
        yield from check()
