"""How long the registry takes to import, to answer `cs336 --help`, and to hand out a callable.

Each figure stands beside `python -c pass`, measured in the same interleaved rounds, since only the ratio means
something on a shared machine. Run: python benchmarks/startup.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import timeit
from pathlib import Path

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import cs336_registry": [sys.executable, "-c", "import cs336_registry"],
    "cs336 --help": [str(Path(sys.executable).with_name("cs336")), "--help"],
    "cs336 backends": [str(Path(sys.executable).with_name("cs336")), "backends"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def wall(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            seconds[name].append(wall(command))
    base = statistics.median(seconds["python -c pass"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:<24}{median * 1e3:8.1f} ms  {median / base:6.2f} x python -c pass  (best {min(values) * 1e3:.1f})"
        )
    import cs336_registry as registry

    first = timeit.timeit(lambda: registry.get("silu"), number=1)
    later = min(timeit.repeat(lambda: registry.get("silu"), number=20_000, repeat=5)) / 20_000
    print(f"registry.get: first {first * 1e3:.1f} ms, later {later * 1e6:.2f} us")
    print(
        json.dumps(
            {"rounds": rounds, "seconds": {name: statistics.median(v) for name, v in seconds.items()}, "get": later}
        )
    )


if __name__ == "__main__":
    main()
