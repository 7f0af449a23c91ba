"""`cs336 bench`, `cs336 bench report`, `cs336 bench tables`."""

from __future__ import annotations

from pathlib import Path


def bench(
    *components: str,
    backends: list[str] | None = None,
    workload: list[str] | None = None,
    dtype: str | None = None,
    device: str | None = None,
    rounds: int = 9,
    out: Path | None = None,
) -> int:
    """Time components on several backends, each judged for correctness before it is timed.

    Every backend runs in a fresh process; the rounds are interleaved; the machine's limits are measured in the same
    run. Example: `cs336 bench attention rmsnorm --backends reference --backends torch`.

    Parameters
    ----------
    components
        Names such as attention; all components that have workloads when none is given.
    backends
        Backends to compare; every available one by default.
    workload
        Ids of the workloads to run; all that are meant for the device by default.
    dtype
        Floating type, such as bfloat16; the contract's first by default.
    device
        cpu or cuda; the GPU where there is one.
    rounds
        Interleaved rounds; the median and the quartiles are kept.
    out
        A JSONL file that the rows are appended to, such as benchmarks/results/laptop.jsonl; printed only by default.
    """
    from rich.console import Console
    from rich.table import Table

    import cs336_registry as registry

    from ..bench import roofline, rows, runner
    from ..bench.tables import duration
    from ..errors import suggestion
    from ..machine import detect

    console = Console()
    device = device or detect().device
    if device not in ("cpu", "cuda") or (device == "cuda" and not detect().cuda_devices):
        raise ValueError(f"--device is {device!r}, and there is {detect().device} here: leave it out")
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}: it must be at least 1")
    unknown = set(backends or ()) - set(registry.backends())
    if unknown:
        raise ValueError(f"no backend {min(unknown)!r}: {suggestion(min(unknown), registry.backends())}")
    found: list[dict] = []
    limits: dict[str, roofline.Roofline] = {}
    for component in components or registry.components():
        contract = registry.contract(component)
        if dtype is not None and contract.dtypes and dtype not in contract.dtypes:
            raise ValueError(f"{component} has no dtype {dtype!r}: {suggestion(dtype, contract.dtypes)}")
        kind = dtype if contract.dtypes and dtype else next(iter(contract.dtypes), None)
        if kind is not None and kind not in limits:
            limits[kind] = roofline.measure(device, kind)
        chosen = tuple(backends or _providers(component))
        wanted = [one.id for one in runner.workloads(component, device) if workload is None or one.id in workload]
        if not wanted and components:
            known = ", ".join(one.id for one in contract.workloads)
            raise ValueError(f"{component} has no workload {workload} for {device}; it has {known}")
        for name in wanted:
            plan = runner.Plan(
                component=component, workload=name, backends=chosen, device=device, dtype=kind, rounds=rounds
            )
            measured = runner.run(plan, limits.get(kind) if kind else None, console.print)
            found += measured
            if out is not None:
                rows.append(measured, out)
            table = Table(
                "backend", "direction", "median", "quartiles", "share of limit", "peak memory", title_justify="left"
            )
            table.title = f"{component} {name}{f' {kind}' if kind else ''} on {device}"
            for row in (row for row in measured if "seconds" in row):
                share = f"{100 * row['share_of_limit']:.1f} % of {row['limit']}" if "share_of_limit" in row else ""
                spread = f"{duration(row['seconds_low'])} to {duration(row['seconds_high'])}"
                memory = f"{row['peak_memory'] / 1e6:.0f} MB"
                table.add_row(row["backend"], row["direction"], duration(row["seconds"]), spread, share, memory)
            console.print(table)
    return 1 if any("refused" in row for row in found) else 0


def report(*, results: Path = Path("benchmarks/results"), out: Path = Path("benchmarks/report.html")) -> int:
    """Draw every committed result row into one self-contained HTML page.

    Parameters
    ----------
    results
        The folder of JSONL rows.
    out
        The page to write.
    """
    from ..bench import report as page
    from ..bench import rows
    from ..text.files import write_text

    found = rows.some(results)
    write_text(out, page.page(found))
    print(f"wrote {out} ({len(found)} rows)")
    return 0


def tables(*, results: Path = Path("benchmarks/results"), files: list[Path] | None = None, check: bool = False) -> int:
    """Render the tables in README.md from the result rows, or check that they are fresh.

    Parameters
    ----------
    results
        The folder of JSONL rows.
    files
        The Markdown files; README.md by default.
    check
        Change nothing; exit with 1 where a table is stale.
    """
    from ..bench import rows
    from ..bench.tables import rendered, stale
    from ..text.files import write_text

    found = rows.some(results)
    late = [path for path in files or [Path("README.md")] if stale(path, found)]
    for path in late:
        if check:
            print(f"{path} is stale: run cs336 bench tables")
        else:
            write_text(path, rendered(path.read_text(encoding="utf-8"), found))
            print(f"rendered {path}")
    return 1 if check and late else 0


def _providers(component: str) -> list[str]:
    import cs336_registry as registry

    from ..conformance.subject import provides

    return [name for name, status in registry.backends().items() if status.state == "ok" and provides(name, component)]
