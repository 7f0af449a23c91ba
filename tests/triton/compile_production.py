"""Compiles production launches for one card in a process without the interpreter; `test_cross_compilation` runs it.

    python -m tests.triton.compile_production CAPABILITY SHARE SHARES

compiles every SHARES-th launch, beginning with number SHARE, and prints one JSON line per launch.
"""

from __future__ import annotations

import json
import sys


def main(capability: int, share: int, shares: int) -> None:
    from cs336_triton.cross_compilation import CARDS, compile_launch, launches_of, production_calls

    card = CARDS[capability]
    seen = set()
    number = 0
    for label, call in production_calls():
        for launch in launches_of(call, card):
            # Calls share kernels (the delta of attention, say): what compiles to the same thing is compiled once.
            key = _identity(launch)
            if key in seen:
                continue
            seen.add(key)
            number += 1
            if number % shares != share:
                continue
            row = {"label": label, "kernel": launch.kernel.fn.__name__}
            try:
                artifact = compile_launch(launch, card)
                row |= {
                    "shared_memory": artifact.shared_memory,
                    "registers": artifact.registers,
                    "local_memory": artifact.local_memory,
                    "tensor_cores": artifact.tensor_cores,
                }
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            print(json.dumps(row), flush=True)


def _identity(launch) -> tuple:
    """What Triton specialises a kernel on: types, divisibility by 16 and ones, and every constant."""
    arguments = tuple(
        str(argument.dtype)
        if hasattr(argument, "dtype")
        else (type(argument).__name__, argument % 16 == 0, argument == 1, argument >= 2**31)
        if isinstance(argument, int)
        else type(argument).__name__
        for argument in launch.arguments
    )
    return launch.kernel, arguments, str(sorted(launch.keywords.items(), key=lambda item: item[0]))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
