"""A run's folder: its record, its lock, and the names of what is in it.

run.json          configuration, decisions, machine, sizes: written before the first step
metrics.jsonl     one row a step, evaluations, samples
checkpoints/      see checkpoints.py
data/             corpus, tokenizer and tokens, unless data.folder names another place
report.html
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..text.files import write_json
from .errors import RunError
from .metrics import Row, read_metrics


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run."""

    path: Path

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def data(self, shared: str | None) -> Path:
        return Path(shared) if shared else self.path / "data"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process may write here at a time; a killed one leaves no lock behind."""
        import filelock

        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(f"another process is working in {self.path}: wait for it, or choose another --out") from None
        try:
            yield
        finally:
            lock.release()

    def write_record(self, **sections: Any) -> None:
        """run.json: `sections` over what is there already, and where and when the run was started."""
        known = (
            self.record() if self.record_path.is_file() else {"started": datetime.now(UTC).isoformat("T", "seconds")}
        )
        write_json(self.record_path, known | sections | {"machine": _machine(), "versions": _versions()}, indent=2)

    def record(self) -> dict[str, Any]:
        """run.json. Raises FileNotFoundError where `path` holds no run."""
        if not self.record_path.is_file():
            raise FileNotFoundError(f"there is no run in {self.path} (no run.json): pass the --out folder of a run")
        try:
            return json.loads(self.record_path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RunError(f"{self.record_path} is damaged ({error}): delete it and run the command again") from None

    def metrics(self) -> list[Row]:
        return read_metrics(self.metrics_path)


def _machine() -> Mapping[str, Any]:
    from ..machine import detect

    facts = asdict(detect())
    facts["cuda_devices"] = [device["name"] for device in facts["cuda_devices"]]
    return facts | {"processor": _processor(), "memory": _memory()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> int | None:
    """Bytes of main memory, where the system tells."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("cs336-registry", "torch", "numpy")
    }
