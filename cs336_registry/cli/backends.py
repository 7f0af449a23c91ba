"""`cs336 backends`: the grid of backend x component."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..plugin import PluginStatus


def backends(*, json: bool = False, traceback: bool = False) -> int:
    """Show which backend provides which component, and why one is not available.

    Nothing heavy is imported: the grid is read from the backends' manifests.

    Parameters
    ----------
    json
        Print plain data instead of a table.
    traceback
        Print the traceback of every broken backend.
    """
    import cs336_registry as registry

    plugins, names = registry.backends(), registry.components()
    if json:
        print(json_module.dumps({name: _record(status, names) for name, status in plugins.items()}, indent=2))
        return 0
    from rich.console import Console

    console = Console()
    providers = {name: status for name, status in plugins.items() if status.backend is not None}
    for line in _grid(providers, names):
        console.print(line, no_wrap=True, crop=False, overflow="ignore", highlight=False)
    console.print()
    for name, status in plugins.items():
        color = {"ok": "green", "unavailable": "yellow"}.get(status.state, "red")
        summary = status.reason or (status.backend.summary if status.backend else "")
        origin = f" [dim]({status.distribution} {status.version})[/dim]" if status.distribution else ""
        console.print(f"[{color}]{status.state:<12}[/{color}] [bold]{name}[/bold]{origin}: ", end="")
        console.print(summary, markup=False, soft_wrap=True)
        if traceback and status.traceback:
            console.print(status.traceback, markup=False, style="dim")
    notes = (
        "ok: provided; +: composed in the core from this backend's other components; -: provided, not available here.",
        "cs336 explain COMPONENT says which one would be used; CS336_BACKEND=NAME chooses one.",
    )
    console.print("\n" + "\n".join(notes), style="dim", soft_wrap=True)
    return 0


def _grid(providers: Mapping[str, PluginStatus], components: Sequence[str]) -> list[str]:
    """A line per backend with its name above its narrow column, then a line per component; a dozen fit 80 columns."""
    indent = max(map(len, components)) + 2
    lines = []
    for place, (name, status) in enumerate(providers.items()):
        style = "bold" if status.state == "ok" else "yellow"
        lines.append(" " * indent + "[dim]|[/dim]   " * place + f"[{style}]{name}[/{style}]")
    for component in components:
        cells = (_cell(component, status) for status in providers.values())
        styled = (f"[{style}]{text:<4}[/{style}]" if text else " " * 4 for text, style in cells)
        lines.append(f"{component:<{indent}}{''.join(styled)}".rstrip())
    return lines


def _cell(component: str, status: PluginStatus) -> tuple[str, str]:
    """What stands in a cell, and its style."""
    import cs336_registry as registry

    assert status.backend is not None, "a row without a manifest has no column"
    if status.backend.implementation(component) is not None:
        return ("ok", "green") if status.state == "ok" else ("-", "yellow")
    parts = registry.contract(component).composed_of
    composed = parts and all(status.backend.implementation(part) for part in parts)
    return ("+" if status.state == "ok" else "-", "dim") if composed else ("", "dim")


def _record(status: PluginStatus, names: Sequence[str]) -> dict[str, Any]:
    provided = [name for name in names if status.backend is not None and status.backend.implementation(name)]
    return {
        "state": status.state,
        "reason": status.reason,
        "distribution": status.distribution,
        "version": status.version,
        "components": provided,
    }
