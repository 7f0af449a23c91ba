"""A Python process that answers lines of JSON with lines of JSON: both ends of the pipe.

The process is a module run with `python -m`. Nothing is pickled, and nothing of the caller's own script is imported
again, as multiprocessing would.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any


class Died(RuntimeError):
    """The process ended, or said nothing in time."""


class Answering:
    """The caller's end: `python -m module`, which is killed when it is closed."""

    def __init__(self, module: str, name: str, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send a line without waiting. A process that ended meanwhile is noticed by the next `answer`."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def answer(self, seconds: float | None = None) -> dict[str, Any]:
        """The next line. Raises Died where the process ended, or said nothing for `seconds`."""
        assert self.process.stdout
        with selectors.DefaultSelector() as selector:
            # One line answers one line, so nothing can wait in the buffer where `select` does not see it.
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise Died(f"{self.name} did not answer within {seconds:g} s")
        line = self.process.stdout.readline()
        if not line:
            raise Died(f"{self.name} ended with code {self.process.wait()} (its messages are above)")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def answers() -> Callable[[Mapping[str, Any]], None]:
    """The other end: a function that sends a line. What libraries print goes to stderr from now on."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: Mapping[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")

    return answer
