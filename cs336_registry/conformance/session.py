"""The kit as a function, for the command line and for other programs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """`exit_code` is pytest's (0: every claim that was judged holds); `record` is what `--cs336-json` writes."""

    exit_code: int
    record: dict[str, Any]


def run_conformance(
    backends: str | Sequence[str],
    *,
    components: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    audit: bool = False,
    strict: bool = False,
    seed: int = 0,
    seeds: int = 1,
    json_path: str | Path | None = None,
    workers: int | str = 0,
    pytest_arguments: Sequence[str] = (),
) -> Report:
    """Judge `backends` in a pytest session of this process and return what was found.

    workers: processes of pytest-xdist ("auto": one a core), 0 for none. pytest_arguments: anything else for pytest,
    such as ("--junitxml=conformance.xml",). Raises ModuleNotFoundError, with the cure, where pytest is not installed.
    """
    try:
        import pytest
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the conformance kit runs on pytest, which is missing: pip install pytest") from error
    kept = _Kept()
    with tempfile.TemporaryDirectory() as folder:
        # A failed check is told in a line, below: nothing of the kit's inside helps.
        arguments = ["--pyargs", "cs336_registry.conformance", "-q", "--no-header", "--tb=no", "-rN"]
        arguments += ["-p", "no:cacheprovider"]
        arguments += ["-c", _empty_configuration(Path(folder)), f"--cs336-seed={seed}"]
        # This process has imported the package already, and its asserts are not pytest's to rewrite.
        arguments += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
        arguments += [f"--cs336-json={json_path}"] if json_path is not None else []
        arguments += [f"--cs336-seeds={seeds}"]
        arguments += [f"--cs336-backend={name}" for name in ([backends] if isinstance(backends, str) else backends)]
        arguments += [f"--cs336-components={','.join(components)}"] if components else []
        arguments += [f"--cs336-dtypes={','.join(dtypes)}"] if dtypes else []
        arguments += [name for name, wanted in (("--cs336-audit", audit), ("--cs336-strict", strict)) if wanted]
        arguments += ["-n", str(workers)] if workers else []
        exit_code = int(pytest.main([*arguments, *pytest_arguments], plugins=[*_plugins(), kept]))
    return Report(exit_code, kept.record)


class _Kept:
    """Tells what failed, a line each, and takes the record over from the session before it is gone."""

    def __init__(self) -> None:
        self.record: dict[str, Any] = {}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        failed = [report for kind in ("failed", "error") for report in terminalreporter.stats.get(kind, ())]
        for report in failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(report.longrepr) if crash is None else crash.message
            terminalreporter.write_line(f"FAILED {_check(report)}: {(reason.strip() or 'no reason').splitlines()[0]}")
        if failed:
            backends = " ".join(f"--cs336-backend={name}" for name in terminalreporter.config.option.cs336_backend)
            terminalreporter.write_line(
                f'one of them with all of pytest: pytest --pyargs cs336_registry.conformance {backends} -k "'
                f'{_check(failed[0]).translate(_WORDS)}"'
            )

    def pytest_unconfigure(self, config: Any) -> None:
        recorder = config.pluginmanager.get_plugin("cs336_record")
        self.record = recorder.to_dict() if recorder is not None else {}


_WORDS = str.maketrans({"[": " and ", "-": " and ", "]": None})
"""Turns a check's name into an expression of pytest's -k."""


def _check(report: Any) -> str:
    return report.nodeid.rpartition("::")[2]


def _empty_configuration(folder: Path) -> str:
    """A pytest.ini of our own: the caller's project may have options that do not concern a backend."""
    path = folder / "pytest.ini"
    path.write_text("[pytest]\n", encoding="utf-8")
    return str(path)


def _plugins() -> list[Any]:
    """The kit's plugin, where the installation's entry points do not bring it."""
    from importlib.metadata import entry_points

    from . import plugin

    installed = any(entry.value == plugin.__name__ for entry in entry_points(group="pytest11"))
    return [] if installed else [plugin]
