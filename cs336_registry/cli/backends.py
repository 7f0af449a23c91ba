"""`cs336 backends`: the grid of backend x component."""

from __future__ import annotations

import json as json_module


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
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    grid = Table(
        title="backend x component", title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    grid.add_column("component", no_wrap=True)
    providers = {name: status for name, status in plugins.items() if status.backend is not None}
    for name, status in providers.items():
        grid.add_column(name if status.state == "ok" else f"{name}\n[yellow]{status.state}[/yellow]", justify="center")
    for component in names:
        cells = [_cell(component, status) for status in providers.values()]
        grid.add_row(component, *cells)
    console.print(grid)
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
        "parts: composed in the core from this backend's other components; -: provided, not available here.",
        "cs336 explain COMPONENT says which one would be used; CS336_BACKEND=NAME chooses one.",
    )
    console.print("\n" + "\n".join(notes), style="dim", soft_wrap=True)
    return 0


def _cell(component: str, status) -> str:
    import cs336_registry as registry

    if status.backend.implementation(component) is None:
        parts = registry.contract(component).composed_of
        composed = parts and all(status.backend.implementation(part) for part in parts)
        return "[dim]parts[/dim]" if composed else ""
    return "ok" if status.state == "ok" else "[yellow]-[/yellow]"


def _record(status, names) -> dict:
    provided = [name for name in names if status.backend is not None and status.backend.implementation(name)]
    return {
        "state": status.state,
        "reason": status.reason,
        "distribution": status.distribution,
        "version": status.version,
        "components": provided,
    }
