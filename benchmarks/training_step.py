"""One training step of a small Transformer, backend by backend: tokens per second and peak memory.

Every backend runs in a fresh process, which must first reproduce the reference's losses over a few steps; rounds are
interleaved. Example: python benchmarks/training_step.py --backends reference torch --size small
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from cs336_registry.bench import rows
from cs336_registry.bench.measurement import calls_for, seconds_per_call
from cs336_registry.bench.worker import peak_memory, versions

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(vocab_size=512, context_length=64, d_model=64, num_layers=2, num_heads=4, d_ff=192),
    "small": dict(vocab_size=4096, context_length=128, d_model=256, num_layers=4, num_heads=8, d_ff=704),
    "tinystories_17m": dict(vocab_size=10000, context_length=256, d_model=512, num_layers=4, num_heads=16, d_ff=1344),
    "gpt2_124m": dict(vocab_size=50257, context_length=1024, d_model=768, num_layers=12, num_heads=12, d_ff=2048),
}
LOSSES = 3
"""Steps whose losses must agree before anything is timed."""


def build(size: str, batch: int, device: str, dtype: str, backend: str):
    """A function that takes one step and returns the loss, and the backends that serve it."""
    import torch

    import cs336_registry as registry

    sizes = SIZES[size]
    torch.manual_seed(0)
    names = ("transformer_lm", "adamw", "cross_entropy", "gradient_clipping")
    build_lm, adamw, cross_entropy, clip = (registry.get(name, backend=backend, device=device) for name in names)
    model = build_lm(**sizes).to(device, getattr(torch, dtype))
    optimizer = adamw(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, sizes["vocab_size"], (batch, sizes["context_length"] + 1), device=device)

    def step():
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step, [registry.resolve(name, backend=backend, device=device).to_dict() for name in names]


def losses(size: str, batch: int, device: str, dtype: str, backend: str) -> list[float]:
    step, _ = build(size, batch, device, dtype, backend)
    return [float(step().detach()) for _ in range(LOSSES)]


def worker(options: argparse.Namespace) -> None:
    """Judge and time one backend: a line of JSON, then one more for every line read."""
    common = (options.size, options.batch, options.device, options.dtype)
    expected, found = losses(*common, "reference!"), losses(*common, f"{options.worker}!")
    # Rounding differs from kernel to kernel; after three steps a sound backend is still within a thousandth in float32.
    allowed = 1e-3 if options.dtype == "float32" else 3e-2
    if any(abs(one - other) > allowed * abs(other) for one, other in zip(found, expected, strict=True)):
        return print(json.dumps({"refused": f"losses are {found}, the reference's {expected}"}), flush=True)
    step, decisions = build(*common, f"{options.worker}!")
    calls = calls_for(step, options.device, budget=0.5)
    print(json.dumps({"decisions": decisions, "calls": calls, "versions": versions()}), flush=True)
    for _ in sys.stdin:
        print(json.dumps([seconds_per_call(step, calls, options.device), peak_memory(options.device)]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["reference", "torch"])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="a JSONL file that the rows are appended to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    workers = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in options.backends
    }
    found: dict[str, dict[str, Any]] = {}
    for name, process in workers.items():
        reply = json.loads(process.stdout.readline() or '{"refused": "the process ended"}')
        if "refused" in reply:
            print(f"{name}: no speed, the result is not right: {reply['refused']}")
        else:
            found[name] = reply | {"rounds": []}
    for _ in range(options.rounds):
        for name, reply in found.items():
            workers[name].stdin.write("\n")
            workers[name].stdin.flush()
            reply["rounds"].append(json.loads(workers[name].stdout.readline()))
    tokens = options.batch * SIZES[options.size]["context_length"]
    for name, reply in found.items():
        seconds = [one for one, _ in reply["rounds"]]
        row = {
            "benchmark": "training_step",
            "workload": f"{options.size}x{options.batch}",
            "backend": name,
            "dtype": options.dtype,
            "device": options.device,
            "direction": "both",
            "seconds": statistics.median(seconds),
            "seconds_low": min(seconds),
            "seconds_high": max(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
            "peak_memory": max(memory for _, memory in reply["rounds"]),
            "decisions": reply["decisions"],
            "versions": reply["versions"],
            **rows.environment(options.device),
        }
        print(f"{name:<12}{row['tokens_per_second']:12.0f} tokens/s  {row['peak_memory'] / 1e6:8.0f} MB")
        if options.out:
            rows.append([row], options.out)
    for process in workers.values():
        process.kill()


if __name__ == "__main__":
    main()
