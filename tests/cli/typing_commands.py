"""Typing a command in a test: what it printed and how it ended."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from cs336_registry import cli


@dataclass(frozen=True)
class Typed:
    code: int
    out: str
    err: str

    def failed_with(self, *words: str) -> bool:
        """One line on stderr that has all of `words`."""
        last = self.err.splitlines()[-1] if self.err else ""
        return self.code == 1 and last.startswith("error: ") and all(word in last for word in words)


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> Typed:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    return Typed(int(stopped.value.code or 0), *capsys.readouterr())
