"""`cs336 components`: the contracts."""

from __future__ import annotations

import inspect


def components(component: str | None = None, /) -> int:
    """List the components, or show the contract of one.

    Parameters
    ----------
    component
        A name such as attention: prints its signature, formula, paper, cases, laws and who provides it.
    """
    from rich.console import Console
    from rich.table import Table

    import cs336_registry as registry

    console = Console()
    if component is None:
        table = Table(header_style="bold", pad_edge=False)
        for column in ("component", "kind", "what it is", "cases", "laws"):
            table.add_column(column)
        for name in registry.components():
            contract = registry.contract(name)
            table.add_row(name, contract.kind, contract.summary, str(len(contract.cases)), str(len(contract.laws)))
        console.print(table)
        return 0
    contract = registry.contract(component)
    parameters = ", ".join(map(str, contract.parameters.values()))
    console.print(f"{component}({parameters})", style="bold", markup=False, highlight=False)
    console.print(inspect.cleandoc(contract.signature.__doc__ or ""), markup=False, highlight=False)
    console.print(f"\nformula: {contract.formula}\npaper: {contract.paper}", markup=False)
    console.print(f"cases: {', '.join(case.id for case in contract.cases)}", markup=False)
    for law in contract.laws:
        console.print(f"law {law.id}: {law.statement}", markup=False)
    providers = [
        name
        for name, status in registry.backends().items()
        if status.backend and status.backend.implementation(component)
    ]
    console.print(f"backends: {', '.join(providers) or 'composed in the core'}")
    return 0
