"""Block sizes, warps and pipeline stages of every kernel: looked up in static tables, tuned only on request.

The tables are `tables/sm_<capability>.json`, written by `benchmarks/triton_tuning.py` from measurements on that card:
a list of rows {kernel, dtype, bucket, num_warps, num_stages, constants} beside the card, driver, versions and commit.
Where a table has no row, the kernel's own default (a function in its file) answers.

CS336_TRITON_TUNE=1 lets a kernel with several candidates (attention's) time them on its first call of each (kernel,
dtype, bucket) and keeps the winners in $XDG_CACHE_HOME/cs336_registry/triton/<card>-<Triton's version>.json. Without
it nothing is ever timed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import triton

from .runtime import INTERPRETER_CARD, Card, card, dtype_name

Key = tuple[str, str, str]
"""A kernel, a dtype and a shape bucket."""

TABLES = Path(__file__).parent / "tables"
TUNE_VARIABLE = "CS336_TRITON_TUNE"


@dataclass(frozen=True)
class Configuration:
    """How one kernel is launched. `constants` are its tl.constexpr parameters that only change speed."""

    num_warps: int = 4
    num_stages: int = 2
    constants: tuple[tuple[str, Any], ...] = field(default=())

    @classmethod
    def of(cls, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> Configuration:
        return cls(num_warps, num_stages, tuple(sorted(constants.items())))

    def __getitem__(self, name: str) -> Any:
        return self.keywords[name]

    @cached_property
    def keywords(self) -> dict[str, Any]:
        """Everything `runtime.launch` takes by keyword; not to be changed."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **dict(self.constants)}


def configuration(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    bucket: str,
    default: Callable[[Card], Configuration],
    *,
    candidates: Callable[[Card], Iterable[Configuration]] | None = None,
    run: Callable[[Configuration], None] | None = None,
) -> Configuration:
    """The configuration of `kernel` for this card, dtype and shape bucket ("d128_causal", "32768" ...).

    `default(card)` answers where no table does; on a card it is asked once for each key. `candidates` and
    `run(configuration)`, which launches the kernel with that configuration, are used only under CS336_TRITON_TUNE=1;
    `run` may be called many times, so a kernel that adds to its output can't be tuned this way.
    """
    the_card = card(device)
    if _experiment is not None:
        key = (kernel, dtype_name(dtype), bucket)
        return _experiment.answer(key, lambda: (default(the_card), *(candidates(the_card) if candidates else ())))
    if run is not None and candidates is not None and tuning_requested() and _can_time(device):
        return _tuned((kernel, dtype_name(dtype), bucket), device, tuple(candidates(the_card)), run)
    found = _settled.get((the_card, kernel, dtype, bucket))
    if found is None:
        found = table(the_card.capability).get((kernel, dtype_name(dtype), bucket)) or default(the_card)
        # The interpreter's defaults look at sizes besides.
        if the_card is not INTERPRETER_CARD:
            _settled[the_card, kernel, dtype, bucket] = found
    return found


_settled: dict[tuple[Card, str, torch.dtype, str], Configuration] = {}
"""What table or default have answered: a launch asks every time."""


class Experiment:
    """What the tuning script holds while it looks for a better table: it answers in place of table and default.

    `found` collects every key asked for, with the kernel's own candidates, the default first.
    """

    def __init__(self, chosen: Mapping[Key, Configuration]) -> None:
        self.chosen = chosen
        self.found: dict[Key, tuple[Configuration, ...]] = {}

    def answer(self, key: Key, candidates: Callable[[], tuple[Configuration, ...]]) -> Configuration:
        self.found[key] = tuple(dict.fromkeys(candidates()))
        return self.chosen.get(key, self.found[key][0])


_experiment: Experiment | None = None


@contextlib.contextmanager
def experiment(chosen: Mapping[Key, Configuration]) -> Iterator[Experiment]:
    """Inside, `configuration` answers `chosen`, and elsewhere each kernel's default."""
    global _experiment
    previous, _experiment = _experiment, Experiment(chosen)
    try:
        yield _experiment
    finally:
        _experiment = previous


def tuning_requested() -> bool:
    """Whether CS336_TRITON_TUNE asks for tuning; "1" does, "0", empty and unset don't, anything else is an error."""
    value = os.environ.get(TUNE_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{TUNE_VARIABLE} is {value!r}: set it to 1 to tune kernels on their first call, or unset it")
    return value == "1"


@cache
def table(capability: tuple[int, int]) -> dict[Key, Configuration]:
    """The committed table of a card: (kernel, dtype, bucket) to configuration; empty where none was measured."""
    path = TABLES / f"sm_{capability[0]}{capability[1]}.json"
    return read_rows(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.exists() else {}


def read_rows(rows: Iterable[dict[str, Any]]) -> dict[Key, Configuration]:
    return {
        (row["kernel"], row["dtype"], row["bucket"]): Configuration.of(
            row["num_warps"], row["num_stages"], **row["constants"]
        )
        for row in rows
    }


def write_rows(configurations: Mapping[Key, Configuration]) -> list[dict[str, Any]]:
    return [
        {
            "kernel": kernel,
            "dtype": dtype,
            "bucket": bucket,
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
            "constants": dict(chosen.constants),
        }
        for (kernel, dtype, bucket), chosen in sorted(configurations.items())
    ]


def write_json(path: Path, content: Any) -> None:
    """Written beside the target and renamed, so that no reader sees half a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def time_candidates(
    candidates: Iterable[Configuration], run: Callable[[Configuration], None]
) -> list[tuple[float, Configuration]]:
    """(median milliseconds, configuration), fastest first; configurations that don't fit the card are left out."""
    from triton.testing import do_bench

    timed = []
    for index, candidate in enumerate(candidates):
        try:
            timed.append((do_bench(lambda chosen=candidate: run(chosen), return_mode="median"), index, candidate))
        except Exception as error:
            if not does_not_fit(error):
                raise
    if not timed:
        raise RuntimeError("cs336_triton: none of the candidate configurations runs on this card")
    return [(milliseconds, candidate) for milliseconds, _, candidate in sorted(timed, key=lambda row: row[:2])]


def does_not_fit(error: Exception) -> bool:
    """Whether `error` says that a configuration asks too much of the card or of the compiler."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, (OutOfResources, PTXASError, CompilationError)):
        return True
    # What fails in one of Triton's passes has no class of its own.
    return isinstance(error, RuntimeError) and "PassManager" in str(error)


def cache_path(device: torch.device) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    card_name = "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name(device))
    return root / "cs336_registry" / "triton" / f"{card_name}-{triton.__version__}.json"


_tuned_rows: dict[Path, dict[Key, Configuration]] = {}


def _can_time(device: torch.device) -> bool:
    """Timing synchronises: never inside a CUDA graph capture, and the interpreter has nothing to time."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _tuned(
    key: Key,
    device: torch.device,
    candidates: tuple[Configuration, ...],
    run: Callable[[Configuration], None],
) -> Configuration:
    path = cache_path(device)
    if path not in _tuned_rows:
        _tuned_rows[path] = _read_cache(path)
    rows = _tuned_rows[path]
    if rows.get(key) not in candidates:
        winner = time_candidates(candidates, run)[0][1]
        # Other processes may have written winners meanwhile: theirs stay.
        rows |= {**_read_cache(path), key: winner}
        write_json(path, write_rows(rows))
    return rows[key]


def _read_cache(path: Path) -> dict[Key, Configuration]:
    try:
        return read_rows(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a table of configurations ({error}): delete it to tune again") from error
