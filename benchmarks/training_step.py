"""One training step of a small Transformer, backend by backend: tokens per second, model FLOP/s and peak memory.

    python benchmarks/training_step.py --backends reference torch torch+compile --size small
    python benchmarks/training_step.py --device cuda --dtype bfloat16 --size gpt2_124m --batch 16 --out rows.jsonl

A backend is a selector ("triton", "torch,rmsnorm=liger"), or one with "+compile" behind it, whose model and loss go
through torch.compile, or with "+graph" (CUDA; "+compile+graph" is both), whose forward and backward passes are captured
once as a CUDA graph and replayed. The step clips, and takes the loss by linear_cross_entropy where the backend asked
for has it and the selector names no cross_entropy, so that a backend that never holds all logits may show it. Every
backend runs in a fresh process, which must first reproduce the reference's losses over a few steps of a model of the
same widths, two layers deep. Rounds are interleaved; with --alone each process ends before the next one starts, for
sizes of which a card holds one at a time.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cs336_registry.bench import roofline, rows
from cs336_registry.bench.measurement import calls_for, seconds_per_call
from cs336_registry.bench.worker import peak_memory, versions
from cs336_registry.cuda_graph import captured

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(vocab_size=512, context_length=64, d_model=64, num_layers=2, num_heads=4, d_ff=192),
    "rehearsal": dict(vocab_size=61, context_length=16, d_model=16, num_layers=1, num_heads=1, d_ff=24),
    "small": dict(vocab_size=4096, context_length=128, d_model=256, num_layers=4, num_heads=8, d_ff=704),
    "tinystories_17m": dict(vocab_size=10000, context_length=256, d_model=512, num_layers=4, num_heads=16, d_ff=1344),
    "gpt2_124m": dict(vocab_size=50257, context_length=1024, d_model=768, num_layers=12, num_heads=12, d_ff=2048),
    "1b": dict(vocab_size=32000, context_length=2048, d_model=2048, num_layers=16, num_heads=16, d_ff=5632),
}
LOSSES = 3
"""Steps whose losses must agree before anything is timed."""


def build(sizes: dict[str, int], batch: int, device: str, dtype: str, backend: str):
    """A function that takes one step and returns the loss, and the backends that serve it."""
    import torch

    import cs336_registry as registry

    backend, *ways = backend.split("+")
    if unknown := set(ways) - {"compile", "graph"}:
        raise ValueError(f"+{min(unknown)} is no way to run a step: +compile or +graph")
    names = ["transformer_lm", "adamw", "gradient_clipping"]
    names.append("linear_cross_entropy" if serves_whole_loss(backend, device) else "cross_entropy")
    decisions = [registry.resolve(name, backend=backend, device=device).to_dict() for name in names]
    build_lm, adamw, clip, loss_of = (registry.get(name, backend=backend, device=device) for name in names)
    torch.manual_seed(0)
    model = build_lm(**sizes, device=device).to(getattr(torch, dtype))
    tokens = torch.randint(0, sizes["vocab_size"], (batch, sizes["context_length"] + 1), device=device)
    clipping = {"max_l2_norm": 1.0} if "max_l2_norm" in inspect.signature(adamw).parameters else {}
    optimizer = adamw(model.parameters(), lr=1e-3, **clipping)

    def loss_at(inputs, targets):
        if names[-1] == "cross_entropy":
            return loss_of(model(inputs), targets)
        return loss_of(model.hidden_states(inputs), model.lm_head.weight, targets)

    if "compile" in ways:
        # Forget the smaller model that was judged: another batch of the same code would be compiled for any batch.
        torch._dynamo.reset()
        loss_at = torch.compile(loss_at, dynamic=False)

    def differentiate():
        optimizer.zero_grad()
        loss = loss_at(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return loss

    if "graph" in ways:
        differentiate = captured(differentiate)

    def step():
        loss = differentiate()
        if not clipping:
            clip(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step, decisions, sum(parameter.numel() for parameter in model.parameters())


def serves_whole_loss(backend: str, device: str) -> bool:
    """Whether the first backend that the selector prefers provides linear_cross_entropy, and no other the loss."""
    import cs336_registry as registry

    served = registry.resolve("linear_cross_entropy", backend=backend, device=device).backend
    return served == backend.split(",")[0].rstrip("!") and "cross_entropy=" not in backend


def losses(options: argparse.Namespace, backend: str) -> list[float]:
    sizes = {**SIZES[options.size], "num_layers": min(2, SIZES[options.size]["num_layers"])}
    step, _, _ = build(sizes, min(options.batch, 2), options.device, options.dtype, backend)
    return [float(step().detach()) for _ in range(LOSSES)]


def demanded(backend: str) -> str:
    """Nothing may fall back: every part of the selector that names no component is a demand."""
    selector, plus, compiled = backend.partition("+")
    return ",".join(part if "=" in part else f"{part}!" for part in selector.split(",")) + plus + compiled


def worker(options: argparse.Namespace) -> None:
    """Judge and time one backend: a line of JSON, then one more for every line read."""
    expected, found = losses(options, "reference!"), losses(options, demanded(options.worker))
    # Rounding differs from kernel to kernel; after three steps a sound backend is still within a thousandth in float32.
    allowed = 1e-3 if options.dtype == "float32" else 3e-2
    if any(abs(one - other) > allowed * abs(other) for one, other in zip(found, expected, strict=True)):
        return print(json.dumps({"refused": f"losses are {found}, the reference's {expected}"}), flush=True)
    backend = demanded(options.worker)
    peak_memory(options.device)
    step, decisions, parameters = build(SIZES[options.size], options.batch, options.device, options.dtype, backend)
    calls = calls_for(step, options.device, budget=0.5)
    # A graph that is replayed allocates nothing any more: its memory was taken when it was captured.
    captured_memory = peak_memory(options.device) if "+graph" in backend else 0
    reply = {"decisions": decisions, "calls": calls, "versions": versions(), "parameters": parameters}
    print(json.dumps(reply), flush=True)
    for _ in sys.stdin:
        seconds = seconds_per_call(step, calls, options.device)
        print(json.dumps([seconds, max(peak_memory(options.device), captured_memory)]), flush=True)


def flops_per_token(size: str, parameters: int) -> float:
    """Six per weight that is multiplied, and the two products of causal attention, forward and backward."""
    sizes = SIZES[size]
    multiplied = parameters - sizes["vocab_size"] * sizes["d_model"]
    return 6.0 * multiplied + 6.0 * sizes["num_layers"] * sizes["context_length"] * sizes["d_model"]


class Contender:
    """One backend's process."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rounds: list[tuple[float, int]] = []

    def ready(self) -> bool:
        self.reply = json.loads(self.process.stdout.readline() or '{"refused": "the process ended: see above"}')
        if "refused" in self.reply:
            print(f"{self.name}: no speed, the result is not right: {self.reply['refused']}", flush=True)
        return "refused" not in self.reply

    def round(self) -> bool:
        """Time one round; False where the process is gone."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        line = self.process.stdout.readline()
        if line:
            self.rounds.append(json.loads(line))
        return bool(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def row(self, options: argparse.Namespace, matmul: float) -> dict[str, Any]:
        tokens = options.batch * SIZES[options.size]["context_length"]
        seconds = [one for one, _ in self.rounds]
        median = statistics.median(seconds)
        flops = tokens * flops_per_token(options.size, self.reply["parameters"]) / median
        return {
            "benchmark": "training_step",
            "workload": f"{options.size}x{options.batch}",
            "backend": self.name,
            "dtype": options.dtype,
            "device": options.device,
            "direction": "both",
            "seconds": median,
            "seconds_low": min(seconds),
            "seconds_high": max(seconds),
            "tokens_per_second": tokens / median,
            "parameters": self.reply["parameters"],
            "flops_per_second": flops,
            "matmul_flops_per_second": matmul,
            "peak_memory": max(memory for _, memory in self.rounds),
            "decisions": self.reply["decisions"],
            "versions": self.reply["versions"],
            **rows.environment(options.device),
        }


def report(contenders: list[Contender], options: argparse.Namespace, matmul: float) -> None:
    """Print and keep what is finished."""
    for contender in contenders:
        row = contender.row(options, matmul)
        line = f"{contender.name:<32}{row['tokens_per_second']:12.0f} tokens/s"
        line += (
            f"  {row['flops_per_second'] / 1e12:6.1f} TFLOP/s ({row['flops_per_second'] / matmul:.1%} of the product)"
        )
        print(f"{line}  {row['peak_memory'] / 1e6:8.0f} MB", flush=True)
        if options.out:
            rows.append([row], options.out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["reference", "torch"])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7, help="0 compiles everything and times nothing")
    parser.add_argument("--alone", action="store_true", help="one process at a time, rounds not interleaved")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no backend after this long")
    parser.add_argument("--out", type=Path, help="a JSONL file that the rows are appended to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.worker:
        return worker(options)
    started = time.monotonic()
    matmul = roofline.measure(options.device, options.dtype).matmul_flops_per_second
    if options.device == "cuda":
        import torch

        torch.cuda.empty_cache()
    groups = [[name] for name in options.backends] if options.alone else [options.backends]
    for group in groups:
        if time.monotonic() - started > options.seconds:
            print(f"{', '.join(group)}: not timed, {options.seconds:.0f} seconds are over", flush=True)
            continue
        contenders = [Contender(name) for name in group]
        try:
            sound = [contender for contender in contenders if contender.ready()]
            for _ in range(options.rounds):
                sound = [contender for contender in sound if contender.round()]
        finally:
            # An interrupted run keeps what it has timed.
            report([contender for contender in contenders if contender.rounds], options, matmul)
            for contender in contenders:
                contender.end()


if __name__ == "__main__":
    main()
