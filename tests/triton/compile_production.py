"""Compiles launches for one card in a process without the interpreter; `test_cross_compilation` runs it.

    python -m tests.triton.compile_production CAPABILITY SHARE SHARES [cases]

compiles every SHARES-th distinct production launch, beginning with number SHARE, and prints one JSON line for each.
With `cases` it compiles what the contracts' cases launch instead, forward and backward: small and odd sizes, for which
Triton specialises kernels in its own ways (a size of 1 becomes a constant), and which the interpreter does not see.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial


def main(capability: int, share: int, shares: int, *calls: str) -> None:
    from cs336_triton.cross_compilation import CARDS, compile_launch, launches_of, production_calls

    card = CARDS[capability]
    seen = set()
    number = 0
    for label, call in case_calls() if calls == ("cases",) else production_calls():
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
            start = time.perf_counter()
            try:
                artifact = compile_launch(launch, card)
                row |= {
                    "shared_memory": artifact.shared_memory,
                    "registers": artifact.registers,
                    "local_memory": artifact.local_memory,
                    "tensor_cores": artifact.tensor_cores,
                    "warp_roles": "setmaxnreg.inc" in artifact.ptx and "setmaxnreg.dec" in artifact.ptx,
                    "copy_engine": "cp.async.bulk.tensor" in artifact.ptx,
                }
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
            row["seconds"] = round(time.perf_counter() - start, 2)
            print(json.dumps(row), flush=True)


def case_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every contract's cases in every dtype that this backend claims, forward and backward."""
    import cs336_triton

    from cs336_registry import registry
    from cs336_registry.arguments import ArgumentMaker
    from cs336_registry.conformance.trial import Upstream, gradients_of

    def run(contract, implementation, case, dtype) -> None:
        arguments = contract.arguments(case, ArgumentMaker(case.seed, dtype=dtype))
        if contract.differentiable:
            gradients_of(contract, implementation, arguments, Upstream(case.seed, dtype))
        else:
            contract.run(implementation, arguments)

    for claim in cs336_triton.cs336_backend().implementations:
        contract = registry.contract(claim.component)
        module, _, name = claim.target.partition(":")
        implementation = getattr(importlib.import_module(module), name)
        for case in contract.cases:
            for dtype in claim.dtypes:
                call = partial(run, contract, implementation, case, dtype)
                yield f"{claim.component}:{case.id}_{dtype}", call


def _identity(launch) -> tuple:
    """What Triton specialises a kernel on: types, divisibility by 16 and ones, and every constant."""
    arguments = tuple(
        (str(argument.base.dtype), argument.block_shape)
        if hasattr(argument, "block_shape")
        else (str(argument.dtype), argument.data_ptr() % 16 == 0)
        if hasattr(argument, "dtype")
        else (type(argument).__name__, argument % 16 == 0, argument == 1, argument >= 2**31)
        if isinstance(argument, int)
        else type(argument).__name__
        for argument in launch.arguments
    )
    return launch.kernel, str(arguments), str(sorted(launch.keywords.items(), key=lambda item: item[0]))


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]), *sys.argv[4:])
