"""`cs336 bisect`: which component's swap breaks a command."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from typing import Annotated

from cyclopts import Parameter


def bisect(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    good: str = "reference",
    bad: str,
    components: list[str] | None = None,
) -> int:
    """Find the one component whose swap from a good to a bad backend breaks a command.

    The command is run again and again with CS336_BACKEND set; it breaks where it exits with another code than 0.
    Example: `cs336 bisect --good reference --bad triton -- python train.py`.

    Parameters
    ----------
    command
        What to run, after `--`.
    good
        The backend with which the command works.
    bad
        The backend with which it breaks.
    components
        The components to consider; all that the bad backend provides by default.
    """
    import cs336_registry as registry

    if not command:
        raise ValueError(
            "no command to run: write it after --, for example cs336 bisect --bad triton -- python train.py"
        )
    registry.resolve(registry.components()[0], backend=f"{good},{bad}")
    manifest = registry.backends()[bad].backend
    provided = [name for name in registry.components() if manifest and manifest.implementation(name)]
    suspects = components or provided

    def breaks(swapped: Sequence[str]) -> bool:
        selector = ",".join([good, *(f"{name}={bad}" for name in swapped)])
        code = subprocess.run(command, env={**os.environ, "CS336_BACKEND": selector}).returncode
        print(f"{'breaks' if code else 'works '}  {selector}", flush=True)
        return code != 0

    culprits = first_breaking(suspects, breaks)
    print(f"{' together with '.join(culprits)}: swapping it from {good} to {bad} breaks the command")
    return 0


def first_breaking(suspects: Sequence[str], breaks: Callable[[Sequence[str]], bool]) -> list[str]:
    """The smallest prefix's last suspect, alone where it breaks alone, otherwise with the fewest found that it needs.

    Raises ValueError where the command breaks with no suspect swapped, or works with all of them.
    """
    if breaks([]):
        raise ValueError("the command breaks with the good backend already: there is nothing to bisect")
    if not breaks(suspects):
        raise ValueError(f"the command works with all of {', '.join(suspects)} swapped: there is nothing to find")
    needed: list[str] = []
    rest = list(suspects)
    while True:
        low, high = 0, len(rest)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if breaks([*rest[:middle], *needed]) else (middle, high)
        needed.insert(0, rest[high - 1])
        rest = rest[: high - 1]
        if not rest or breaks(needed):
            return needed
