"""What a conformance session found, as JSON and as the last lines on the screen."""

from __future__ import annotations

import platform
import sys
from collections import Counter, defaultdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .plugin import Settings

FORMAT = 1


class Record:
    """Collects the reports of conformance checks, from this process or from pytest-xdist's workers."""

    def __init__(self, settings: Settings, path: str | None) -> None:
        self.settings, self.path = settings, path
        self.checks: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties).get("cs336")
        if not isinstance(properties, dict) or report.when != "call":
            return
        row = {"check": report.nodeid.rpartition("::")[2], "outcome": _outcome(report), **properties}
        if row["outcome"] in ("failed", "unsupported"):
            row["error"] = _message(report)
        self.checks.append(row | {"seconds": round(report.duration, 4)})

    def pytest_sessionfinish(self) -> None:
        if self.path is not None:
            from ..text.files import write_json

            write_json(self.path, self.to_dict(), indent=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what was judged, where, with which versions, every check, the claims that could be made."""
        return {
            "format": FORMAT,
            "backends": list(self.settings.backends),
            "seed": self.settings.seed,
            "seeds": self.settings.seeds,
            "audit": self.settings.audit,
            "strict": self.settings.strict,
            "machine": {"system": platform.platform(), "python": platform.python_version()},
            "versions": {name: _version(name) for name in ("cs336-registry", "torch", "triton", "numpy")},
            "totals": dict(sorted(Counter(row["outcome"] for row in self.checks).items())),
            "claimable": self.claimable(),
            "checks": sorted(self.checks, key=lambda row: row["check"]),
        }

    def claimable(self) -> list[str]:
        """Claims that are not made although every audited check that lacks just this claim passed."""
        audited: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for row in self.checks:
            if row["outcome"] in ("claimable", "unsupported") and len(row["unclaimed"]) == 1:
                audited[row["backend"], row["component"], row["unclaimed"][0]].append(row["outcome"])
        return [
            f"{backend}: {component} passes {len(outcomes)} of {len(outcomes)} unclaimed checks ({reason}): "
            f"you support this, claim it"
            for (backend, component, reason), outcomes in sorted(audited.items())
            if set(outcomes) == {"claimable"}
        ]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.checks:
            return
        terminalreporter.section("cs336 conformance")
        for backend in self.settings.backends:
            totals = Counter(row["outcome"] for row in self.checks if row["backend"] == backend)
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(totals.items()))
            terminalreporter.write_line(f"{backend}: {counts or 'nothing was judged'}")
        for line in self.claimable():
            terminalreporter.write_line(line)
        if self.path is not None:
            terminalreporter.write_line(f"record: {self.path}")


def _message(report: pytest.TestReport) -> str:
    """What the check said, without the traceback."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr or "")).strip()


def _outcome(report: pytest.TestReport) -> str:
    """pytest's outcome; an audited check that passes is "claimable", one that fails "unsupported"."""
    if hasattr(report, "wasxfail"):
        return "claimable" if report.passed else "unsupported"
    if report.failed and "XPASS(strict)" in str(report.longrepr):
        return "claimable"
    return report.outcome


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "" if name not in sys.modules else "unknown"
