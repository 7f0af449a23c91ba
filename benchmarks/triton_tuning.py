"""Times every kernel's candidate configurations on this card and writes `cs336_triton/tables/sm_<capability>.json`.

    python benchmarks/triton_tuning.py [--only attention] [--seconds 900] [--output FOLDER] [--dry-run]

The launches are the production calls that the op files declare, with random contents. For each kernel, dtype and shape
bucket its own candidates are timed, or the neighbours of its default where it names none; a candidate that spills or
does not fit is left out. Every timing is printed; the table says how much of the default's time each winner takes.
`--dry-run` needs no GPU: it prints what would be timed for a Hopper card.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ADDRESS_TABLES = ("adamw", "gradient_clipping")
"""Components whose launches carry addresses of tensors in a tensor: random contents would be wild pointers."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    import torch
    from cs336_triton import configurations
    from cs336_triton.cross_compilation import CARDS
    from cs336_triton.runtime import INTERPRETING, card

    if not options.dry_run and (INTERPRETING or not torch.cuda.is_available()):
        print("triton_tuning: needs a CUDA device and TRITON_INTERPRET unset (or --dry-run)", file=sys.stderr)
        return 2
    the_card = CARDS[90] if options.dry_run else card(torch.device("cuda", torch.cuda.current_device()))
    deadline = time.monotonic() + options.seconds
    ratios: dict[configurations.Key, dict[configurations.Configuration, list[float]]] = {}
    for label, call in production_calls(options.only):
        with configurations.experiment({}) as found:
            launches_on(the_card, call)
        for key, own in found.found.items():
            candidates = own if len(own) > 1 else (*own, *neighbours(own[0]))
            if options.dry_run:
                print(f"{label}: {' '.join(key)}: {len(candidates)} candidates, default {own[0].keywords}")
                continue
            if time.monotonic() > deadline:
                print(f"{label}: {' '.join(key)}: not timed, {options.seconds} seconds are over")
                continue
            timed = time_all(the_card, call, key, candidates)
            for candidate, milliseconds in timed.items():
                print(f"{label}: {' '.join(key)}: {milliseconds * 1e3:9.1f} us {candidate.keywords}", flush=True)
                ratio = milliseconds / timed[own[0]] if own[0] in timed else math.inf
                ratios.setdefault(key, {}).setdefault(candidate, []).append(ratio)
    if not options.dry_run:
        write_table(the_card, ratios, options.output or configurations.TABLES)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="time only labels that contain this, say attention:bfloat16")
    parser.add_argument("--seconds", type=float, default=900.0, help="start no timing after this long")
    parser.add_argument("--output", type=Path, help="folder of the table (default: the package's)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be timed; needs no GPU")
    return parser.parse_args(arguments)


def production_calls(only: str) -> Iterator[tuple[str, Callable[[], object]]]:
    from cs336_triton import cross_compilation

    for label, call in cross_compilation.production_calls():
        if only in label and label.partition(":")[0] not in ADDRESS_TABLES:
            yield label, call


def launches_on(the_card: Any, call: Callable[[], object]) -> list[Any]:
    from cs336_triton.cross_compilation import launches_of

    return launches_of(call, the_card)


def neighbours(default: Any) -> Iterator[Any]:
    """The default with half and twice its warps, other pipeline depths, and each power of two halved and doubled."""
    from cs336_triton.configurations import Configuration

    constants = dict(default.constants)
    for num_warps in (default.num_warps // 2, default.num_warps * 2):
        if 1 <= num_warps <= 16:
            yield Configuration.of(num_warps, default.num_stages, **constants)
    for num_stages in {1, 2, 3} - {default.num_stages}:
        yield Configuration.of(default.num_warps, num_stages, **constants)
    for name, value in constants.items():
        if type(value) is int and value > 1 and value & (value - 1) == 0:
            for changed in (value // 2, value * 2):
                yield Configuration.of(default.num_warps, default.num_stages, **{**constants, name: changed})


def time_all(the_card: Any, call: Callable[[], object], key: Any, candidates: Any) -> dict[Any, float]:
    """Milliseconds of the whole call with each candidate for `key` and defaults for the other kernels."""
    from cs336_triton import configurations
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    timed = {}
    for candidate in candidates:
        with configurations.experiment({key: candidate}):
            launches = launches_on(the_card, call)
        tensors: dict[int, Any] = {}
        prepared = [(launch, tuple(filled(a, tensors) for a in launch.arguments)) for launch in launches]

        def run(prepared=prepared) -> None:
            for launch, arguments in prepared:
                launch.kernel[launch.grid](*arguments, **launch.keywords)

        try:
            compiled = [launch.kernel[launch.grid](*arguments, **launch.keywords) for launch, arguments in prepared]
            if any(getattr(kernel, "n_spills", 0) for kernel in compiled) and candidate != candidates[0]:
                continue
            timed[candidate] = do_bench(run, return_mode="median")
        except (OutOfResources, PTXASError, CompilationError) as error:
            print(f"{' '.join(key)}: {candidate.keywords} left out: {type(error).__name__}", flush=True)
    return timed


def filled(argument: Any, tensors: dict[int, Any]) -> Any:
    """A tensor on the card in place of a meta tensor: normal numbers, or ones, which are valid as ids and as masks."""
    import torch

    if not isinstance(argument, torch.Tensor):
        return argument
    if id(argument) not in tensors:
        tensor = torch.empty_strided(argument.size(), argument.stride(), dtype=argument.dtype, device="cuda")
        tensors[id(argument)] = tensor.normal_() if tensor.is_floating_point() else tensor.fill_(1)
    return tensors[id(argument)]


def write_table(the_card: Any, ratios: dict[Any, dict[Any, list[float]]], folder: Path) -> None:
    """The winner of each key is the candidate with the least geometric mean of time over the default's time."""
    import torch
    import triton
    from cs336_triton.configurations import write_json, write_rows

    from cs336_registry.bench import rows

    winners, figures = {}, {}
    for key, found in ratios.items():
        runs = max(len(values) for values in found.values())
        means = {one: statistics.geometric_mean(values) for one, values in found.items() if len(values) == runs}
        winners[key] = min(means, key=lambda one: means[one])
        figures[key] = means[winners[key]]
    table = write_rows(winners)
    for row in table:
        row["time_over_default"] = round(figures[(row["kernel"], row["dtype"], row["bucket"])], 4)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    major, minor = the_card.capability
    path = folder / f"sm_{major}{minor}.json"
    write_json(path, {**rows.environment("cuda"), "versions": versions, "rows": table})
    print(f"{len(table)} rows written to {path}")


if __name__ == "__main__":
    sys.exit(main())
