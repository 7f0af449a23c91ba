"""Times every kernel's candidate configurations on this card and writes `cs336_triton/tables/sm_<capability>.json`.

    python benchmarks/triton_tuning.py [--only attention:bfloat16_d128_causal rmsnorm] [--seconds 900] [--output FOLDER]

The launches are the production calls that the op files declare, with random contents. For each kernel, dtype and
shape bucket its own candidates are timed, or the neighbours of its default where it names none; a candidate that does
not fit is left out. Every timing is printed. The table is written anew after each kernel, so that a run that is
cut short keeps what it found; it says how much of the default's time each winner takes.

Two ways need no GPU. `--compile 90` compiles every candidate for that capability in `--processes` processes, prints
registers, spills and shared memory, and leaves Triton's cache full for a timed run that follows. `--rehearse` goes the
whole way with made-up times.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LEFT_OUT = ("adamw", "gradient_clipping")
"""Launches that carry addresses of tensors in a tensor, for which random contents would be wild pointers."""
FIRST = ("attention:bfloat16_d128_causal", "attention:bfloat16_d64_causal", "rmsnorm", "cross_entropy", "softmax")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.compile and options.processes > 1:
        return in_processes(options, arguments)
    import torch
    from cs336_triton import configurations
    from cs336_triton.cross_compilation import CARDS
    from cs336_triton.runtime import INTERPRETING, card

    dry = options.rehearse or options.compile
    if not dry and (INTERPRETING or not torch.cuda.is_available()):
        print("triton_tuning: needs a CUDA device and TRITON_INTERPRET unset (or --rehearse)", file=sys.stderr)
        return 2
    the_card = CARDS[options.compile or 90] if dry else card(torch.device("cuda", torch.cuda.current_device()))
    deadline = time.monotonic() + options.seconds
    ratios: dict[configurations.Key, dict[configurations.Configuration, list[float]]] = {}
    number = 0
    for label, call in production_calls(options.only, options.dtypes):
        with configurations.experiment({}) as found:
            launches_on(the_card, call)
        for key, own in found.found.items():
            candidates = tuple(dict.fromkeys(own if len(own) > 1 else (*own, *neighbours(own[0]))))
            number += 1
            if options.compile:
                if number % options.shares == options.share:
                    compile_all(the_card, call, key, candidates, label)
                continue
            if time.monotonic() > deadline:
                print(f"{label}: {' '.join(key)}: not timed, {options.seconds:.0f} seconds are over")
                continue
            timed = pretended(candidates) if options.rehearse else time_all(the_card, call, key, candidates)
            for candidate, milliseconds in timed.items():
                print(f"{label}: {' '.join(key)}: {milliseconds * 1e3:9.1f} us {candidate.keywords}", flush=True)
                ratio = milliseconds / timed[own[0]] if own[0] in timed else math.inf
                ratios.setdefault(key, {}).setdefault(candidate, []).append(ratio)
            if timed:
                write_table(the_card, ratios, options.output or configurations.TABLES, "cpu" if dry else "cuda")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*FIRST, ""], help="labels that contain one of these, in order")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=900.0, help="start no timing after this long")
    parser.add_argument("--output", type=Path, help="folder of the table (default: the package's)")
    parser.add_argument("--compile", type=int, choices=(80, 90, 100), help="compile only, for this capability")
    parser.add_argument("--processes", type=int, default=1, help="for --compile")
    parser.add_argument("--rehearse", action="store_true", help="made-up times; needs no GPU")
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--shares", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def in_processes(options: argparse.Namespace, arguments: list[str] | None) -> int:
    """`--compile`, every process a share of the kernels."""
    given = sys.argv[1:] if arguments is None else arguments
    share = [sys.executable, __file__, *given, "--processes", "1", "--shares", str(options.processes), "--share"]
    running = [subprocess.Popen([*share, str(number)]) for number in range(options.processes)]
    return max(process.wait() for process in running)


def production_calls(only: list[str], dtypes: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every call that is to be tuned, in the order of `only` and then of `dtypes`."""
    from cs336_triton import cross_compilation

    calls = dict(cross_compilation.production_calls())
    for dtype in dtypes:
        for part in only:
            for label in [label for label in calls if part in label and dtype in label]:
                call = calls.pop(label)
                if label.partition(":")[0] not in LEFT_OUT:
                    yield label, call


def launches_on(the_card: Any, call: Callable[[], object]) -> list[Any]:
    from cs336_triton.cross_compilation import launches_of

    return launches_of(call, the_card)


def neighbours(default: Any) -> Iterator[Any]:
    """The default with half and twice its warps, other pipeline depths, and each power of two halved and doubled."""
    from cs336_triton.configurations import Configuration

    constants = dict(default.constants)
    for num_warps in (default.num_warps // 2, default.num_warps * 2):
        if 1 <= num_warps <= 32:
            yield Configuration.of(num_warps, default.num_stages, **constants)
    for num_stages in {1, 2, 3} - {default.num_stages}:
        yield Configuration.of(default.num_warps, num_stages, **constants)
    for name, value in constants.items():
        if type(value) is int and value > 1 and value & (value - 1) == 0:
            for changed in (value // 2, value * 2):
                yield Configuration.of(default.num_warps, default.num_stages, **{**constants, name: changed})


def pretended(candidates: tuple[Any, ...]) -> dict[Any, float]:
    """Milliseconds as if the last candidate were the fastest."""
    return {candidate: 1.0 - place / 100 for place, candidate in enumerate(candidates)}


def compile_all(the_card: Any, call: Callable[[], object], key: Any, candidates: Any, label: str) -> None:
    """Compile the call with each candidate for `key`, and say what a card would be asked for."""
    from cs336_triton import configurations
    from cs336_triton.cross_compilation import compile_launch

    for candidate in candidates:
        with configurations.experiment({key: candidate}):
            launches = launches_on(the_card, call)
        for launch in configured_by(key, candidate, launches):
            try:
                made = compile_launch(launch, the_card)
            except Exception as error:
                # A candidate that does not compile is a finding, whatever the compiler raised.
                print(f"{label}: {' '.join(key)}: {candidate.keywords}: {type(error).__name__}", flush=True)
                continue
            asked = f"{made.registers} registers, {made.local_memory} bytes spilled, {made.shared_memory} bytes shared"
            print(f"{label}: {' '.join(key)}: {asked} {candidate.keywords}", flush=True)


def configured_by(key: Any, candidate: Any, launches: list[Any]) -> list[Any]:
    """Those of a call's launches that `candidate` configures: by the kernel's name, or else by carrying its numbers."""
    named = [launch for launch in launches if launch.kernel.fn.__name__ == f"{key[0]}_kernel"]
    return named or [
        launch
        for launch in launches
        if all(launch.keywords.get(name, value) == value for name, value in candidate.keywords.items())
    ]


def time_all(the_card: Any, call: Callable[[], object], key: Any, candidates: Any) -> dict[Any, float]:
    """Milliseconds of the launches that `key` configures, with each candidate."""
    from cs336_triton import configurations
    from triton.testing import do_bench

    timed = {}
    tensors: dict[Any, Any] = {}
    for candidate in candidates:
        with configurations.experiment({key: candidate}):
            launches = configured_by(key, candidate, launches_on(the_card, call))
        prepared = [
            (launch, tuple(filled(key[0], launch, place, tensors) for place in range(len(launch.arguments))))
            for launch in launches
        ]

        def run(prepared=prepared) -> None:
            for launch, arguments in prepared:
                launch.kernel[launch.grid](*arguments, **launch.keywords)

        try:
            run()
            timed[candidate] = do_bench(run, warmup=5, rep=30, return_mode="median")
        except Exception as error:
            if not configurations.does_not_fit(error):
                raise
            print(f"{' '.join(key)}: {candidate.keywords} left out: {type(error).__name__}", flush=True)
    return timed


def filled(kernel: str, launch: Any, place: int, tensors: dict[Any, Any]) -> Any:
    """A tensor on the card in place of a meta tensor: normal numbers, or ones, which are valid as ids and as masks.

    The embedding's time depends on how often each token occurs: its ids are as often what tokens of a text are, and
    they stand in any order.

    Candidates share the tensors of equal places and shapes: filling gigabytes would take longer than timing.
    """
    argument = launch.arguments[place]
    if hasattr(argument, "block_shape"):
        return dataclasses.replace(argument, base=made(kernel, launch, place, argument.base, tensors))
    return made(kernel, launch, place, argument, tensors)


def made(kernel: str, launch: Any, place: int, argument: Any, tensors: dict[Any, Any]) -> Any:
    import torch

    if not isinstance(argument, torch.Tensor):
        return argument
    key = (place, argument.size(), argument.stride(), argument.dtype)
    if key not in tensors:
        tensor = torch.empty_strided(argument.size(), argument.stride(), dtype=argument.dtype, device="cuda")
        if tensor.is_floating_point():
            tensor.normal_()
        elif kernel.startswith("embedding"):
            named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
            n_tokens = named["order_pointer"].numel() if "order_pointer" in named else 0
            tensor.copy_(embedding_integers(launch.kernel.arg_names[place], tensor.numel(), n_tokens))
        else:
            tensor.fill_(1)
        tensors[key] = tensor
    return tensors[key]


def embedding_integers(name: str, count: int, n_tokens: int) -> Any:
    """What the embedding's kernels find under this name, `count` numbers for `n_tokens` tokens of a text."""
    import torch

    if name == "order_pointer":
        return torch.randperm(count, generator=torch.Generator().manual_seed(0))
    if name == "first_pointer":
        return torch.searchsorted(sorted_ids(n_tokens), torch.arange(count))
    return sorted_ids(count)


def sorted_ids(count: int) -> Any:
    """`count` ids in 0 ... count - 1, in order, id n about as often as 1 / (n + 1) says (Zipf's law)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return (count ** torch.rand(count, dtype=torch.float64, generator=generator) - 1).long().sort().values


def write_table(the_card: Any, ratios: dict[Any, dict[Any, list[float]]], folder: Path, device: str) -> None:
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
    write_json(path, {**rows.environment(device), "versions": versions, "rows": table})


if __name__ == "__main__":
    sys.exit(main())
