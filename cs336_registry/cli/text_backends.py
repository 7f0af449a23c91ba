"""What the text commands share: choosing a backend, and handing it the options that it has."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text.files import DISK_FULL

if TYPE_CHECKING:
    from ..decision import Decision

DEFAULT_CACHE = Path("data/cache")
FIRST_NAMES = {"num_workers": ("num_workers", "num_threads")}
"""Options that backends call by one of several names, by the command line's name."""


def selector(component: str, backend: str | None) -> str | None:
    """`backend`, or what another layer selects, or the fastest that runs here: a corpus is no place for a textbook."""
    import cs336_registry as registry

    decided = registry.resolve(component, backend=backend)
    return "auto" if backend is None and decided.layer == "default" else backend


def choose(component: str, backend: str | None) -> tuple[Callable[..., Any], Decision]:
    """The callable and the decision for it."""
    import cs336_registry as registry

    chosen = selector(component, backend)
    return registry.get(component, backend=chosen), registry.resolve(component, backend=chosen)


def fitting(function: Callable[..., Any], backend: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `function` takes; raises ValueError where one was asked for (is not None) that it lacks."""
    taken = inspect.signature(function).parameters
    found: dict[str, Any] = {}
    for name, value in options.items():
        known = next((one for one in FIRST_NAMES.get(name, (name,)) if one in taken), None)
        if known is not None:
            found[known] = value
        elif value is not None:
            flag = name.replace("_", "-")
            raise ValueError(f"backend {backend} has no --{flag} ({value}): leave it out, or pass --backend numba_bpe")
    return {name: value for name, value in found.items() if value is not None}


def check_workers(num_workers: int | None) -> None:
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"--num-workers is {num_workers}: it must be at least 1")


def distinct(paths: Sequence[Path], duplicates: str, digests: Sequence[tuple[int, str]]) -> list[Path]:
    """The paths without those whose content another one has; "refuse" raises ValueError at the first."""
    first: dict[tuple[int, str], Path] = {}
    for path, identity in zip(paths, digests, strict=True):
        if identity in first and duplicates == "refuse":
            raise ValueError(
                f"{path} has the same content as {first[identity]}: name it once, or pass --duplicates skip"
            )
        first.setdefault(identity, path)
    return list(first.values())


@contextmanager
def disk_full(out: Path) -> Iterator[None]:
    """Says what a full disk means for the command, and which one it is where that is not the one with `out`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        place, cure = "", "free some space"
        if error.filename is not None and not Path(error.filename).is_relative_to(os.path.realpath(out)):
            place = f" (by writing {error.filename})"
            if Path(error.filename).is_relative_to(tempfile.gettempdir()):
                cure = "free some space there, or set TMPDIR to a folder with more,"
        raise OSError(
            f"the disk is full while {out} is made{place}: what was complete before is kept; {cure} and run the "
            f"same command again"
        ) from None
