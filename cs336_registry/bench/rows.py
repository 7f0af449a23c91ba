"""Result rows: append-only JSON lines, one file per machine, each row complete in itself."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")


def append(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Add `rows` to the file at `path`; a lock keeps two runs from mixing their lines."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def read(folder: Path = RESULTS) -> Iterator[dict[str, Any]]:
    """Every row under `folder`, file by file; ValueError names a line that can't be read."""
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON ({error}): remove the line") from error
            yield row


def some(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All rows under `folder`; ValueError where there are none."""
    found = list(read(folder))
    if not found:
        raise ValueError(
            f"{folder} holds no rows: name the folder with --results, {RESULTS} in a clone of the repository, or "
            f"measure some with cs336 bench COMPONENT --out {folder}/NAME.jsonl"
        )
    return found


def latest(rows: Iterable[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The last row of every combination of `keys`, in the order of their first appearance."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        newest[tuple(str(row.get(key)) for key in keys)] = row
    return list(newest.values())


def environment(device: str) -> dict[str, Any]:
    """When, where and on which commit: what every row says about itself."""
    from ..machine import detect

    machine = detect()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": machine.cuda_devices[0].name if device == "cuda" and machine.cuda_devices else cpu_name(),
        "cores": machine.cpu_count,
        "driver": machine.driver,
        "system": machine.system,
    }


def commit() -> str:
    """The commit that runs, with "+" where the working tree differs; GIT_COMMIT names it outside a checkout."""
    if os.environ.get("GIT_COMMIT"):
        return os.environ["GIT_COMMIT"]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
