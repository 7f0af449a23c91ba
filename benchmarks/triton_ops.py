"""Times the Triton ops and their peers on one GPU, beside the card's own limits, and appends the rows.

    python benchmarks/triton_ops.py [--only attention] [--dtype bfloat16] [--output FILE] [--seconds 150] [--rehearse]

Each contender first computes the op in front of the contract's tolerance; a wrong one is recorded as wrong and not
timed, an absent one as absent. Every contender is timed as a CUDA graph, which leaves the host's time out, or as it is
where it can't be captured ("timing" in the row); the host's time of a call is recorded beside it. Rounds of all
contenders are interleaved, and the median, quartiles and share of the binding limit are recorded. Copy bandwidth and
matrix product are measured in the same run. The rows of an entry are on disk before the next entry starts. `--table`
times the kernels with the configurations of a table that benchmarks/triton_tuning.py wrote. `--prepare` compiles
everything and times nothing: the compilers' caches then serve the timed run. `--rehearse` goes the whole way at toy
sizes on the CPU, with the kernels in the interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

LONGEST = 1.0
"""Seconds of timing after which a contender gets no further round, from the third one on."""


@dataclass(frozen=True)
class Entry:
    """One op at one size. `sizes`, `judged` and `toy` are shape arguments of `tensors`; bytes and flops count one pass.

    judged: what must be right before anything is timed: less of the same, which runs the same compiled kernels, with
    the same widths and numbers of rows that 16 divides too. toy: both on a CPU.
    """

    component: str
    sizes: tuple[int, ...]
    judged: tuple[int, ...]
    toy: tuple[int, ...]
    forward_tensors: float = 0.0
    """Tensors of the largest input's size that a forward pass must move."""
    backward_tensors: float = 0.0
    forward_flops: Callable[..., float] = lambda *sizes: 0.0
    backward_flops: Callable[..., float] = lambda *sizes: 0.0
    options: tuple[tuple[str, Any], ...] = ()


def causal_flops(batch: int, heads: int, kv_heads: int, length: int, d: int) -> float:
    """Two products over half of the scores."""
    return 2.0 * batch * heads * length * length * d


ATTENTION = partial(
    Entry,
    "attention",
    toy=(1, 2, 1, 40, 16),
    forward_flops=causal_flops,
    backward_flops=lambda *sizes: 2.5 * causal_flops(*sizes),
    options=(("is_causal", True),),
)
ENTRIES = (
    Entry("rmsnorm", (32768, 4096), (304, 4096), (5, 33), 2, 3),
    Entry("add_rmsnorm", (32768, 4096), (304, 4096), (5, 33), 4, 4),
    Entry("swiglu", (16384, 11008), (304, 11008), (5, 33), 3, 5),
    Entry("rope", (4, 32, 4096, 128), (1, 32, 1024, 128), (1, 2, 9, 16), 4, 4),
    Entry("softmax", (8192, 32768), (48, 32768), (5, 33), 2, 3),
    Entry("cross_entropy", (8192, 32768), (48, 32768), (5, 33), 1, 2),
    Entry("adamw", (16, 2048, 5632, 32000), (1, 256, 1024, 4096), (1, 8, 12, 33)),
    Entry(
        "linear_cross_entropy",
        (8192, 4096, 128256),
        (4352, 128, 128256),
        (5, 16, 33),
        forward_flops=lambda rows, d, vocab: 2.0 * rows * d * vocab,
        backward_flops=lambda rows, d, vocab: 4.0 * rows * d * vocab,
    ),
    ATTENTION(sizes=(1, 16, 16, 8192, 128), judged=(1, 2, 2, 1024, 128)),
    ATTENTION(sizes=(4, 16, 16, 2048, 128), judged=(1, 2, 2, 1024, 128)),
    ATTENTION(sizes=(4, 32, 32, 4096, 64), judged=(1, 2, 2, 1024, 64)),
    ATTENTION(sizes=(4, 16, 4, 8192, 128), judged=(1, 8, 2, 1024, 128)),
    Entry("rmsnorm", (8192, 16384), (304, 16384), (5, 33), 2, 3),
    Entry("softmax", (32768, 4096), (48, 4096), (5, 33), 2, 3),
    Entry("silu", (16384, 11008), (304, 11008), (5, 33), 2, 3),
    Entry("embedding", (32768, 32768, 4096), (2048, 1024, 4096), (5, 9, 33), 2, 2),
)
"""What the goals speak of comes first: a run may be cut short."""


def tensors(component: str, sizes: tuple[int, ...], dtype: Any, device: str) -> dict[str, Any]:
    """Seeded arguments of an op at these sizes."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    if component in ("rmsnorm", "add_rmsnorm"):
        found = {"x": normal(*sizes), "weight": normal(sizes[-1])}
        return found if component == "rmsnorm" else {**found, "residual": normal(*sizes)}
    if component == "swiglu":
        return {"gate": normal(*sizes), "up": normal(*sizes)}
    if component == "rope":
        angles = torch.randn(sizes[-2], sizes[-1] // 2, generator=generator, device=device)
        return {"q": normal(*sizes), "k": normal(*sizes), "cos": angles.cos(), "sin": angles.sin()}
    if component == "cross_entropy":
        return {"logits": normal(*sizes), "targets": torch.arange(sizes[0], device=device) * 31 % sizes[1]}
    if component == "embedding":
        rows, vocab, d = sizes
        return {"token_ids": torch.arange(rows, device=device) * 31 % vocab, "weight": normal(vocab, d)}
    if component == "linear_cross_entropy":
        rows, d, vocab = sizes
        return {
            "x": normal(rows, d),
            "weight": normal(vocab, d) / d**0.5,
            "targets": torch.arange(rows, device=device) * 31 % vocab,
        }
    if component == "attention":
        batch, heads, kv_heads, length, d = sizes
        return {"q": normal(batch, heads, length, d), **{n: normal(batch, kv_heads, length, d) for n in ("k", "v")}}
    return {"x": normal(*sizes)}


def contenders(component: str, device: str) -> dict[str, Callable[[], Callable[..., Any]]]:
    """Name to a factory of the op; a factory raises ImportError where its library is absent."""

    def backend(package: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{package}.{component}"), component)

    def compiled() -> Callable[..., Any]:
        import torch

        # A rehearsal shows that it traces: compiling C++ would take minutes.
        compiler = "inductor" if device == "cuda" else "aot_eager"
        return torch.compile(backend("cs336_reference"), fullgraph=True, dynamic=False, backend=compiler)

    found = {
        "triton": partial(backend, "cs336_triton"),
        "torch": partial(backend, "cs336_torch"),
        "torch_compile_of_reference": compiled,
    }
    return found | PEERS.get(component, {})


def sdpa(name: str) -> Callable[..., Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q, k, v, is_causal):
        call = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=is_causal)
        grouped = q.shape[1] != k.shape[1]
        if name == "default":
            return call(q, k, v, enable_gqa=grouped)
        with sdpa_kernel(getattr(SDPBackend, name)):
            return call(q, k, v, enable_gqa=grouped)

    return attention


def flash_attention(module: str) -> Callable[..., Any]:
    function = importlib.import_module(module).flash_attn_func

    def attention(q, k, v, is_causal):
        result = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return attention


def quack(name: str) -> Callable[..., Any]:
    function = getattr(importlib.import_module(f"quack.{name}"), name)
    if name == "rmsnorm":
        return partial(function, eps=1e-5)
    if name != "cross_entropy":
        return function

    def cross_entropy(logits, targets):
        losses = function(logits, targets, reduction="none")
        # Not its own mean, whose gradient is one number for all rows: its backward pass takes none that is broadcast.
        return losses.dot(losses.new_full(losses.shape, 1.0 / len(losses))).to(logits.dtype)

    return cross_entropy


def liger(name: str) -> Callable[..., Any]:
    functional = importlib.import_module("liger_kernel.transformers.functional")
    peers = {
        # "gemma": the gain is multiplied in float32, as the contract has it; not over the incoming gradient.
        "rmsnorm": lambda x, weight: functional.liger_rms_norm(x, weight, 1e-5, 0.0, "gemma", False),
        "swiglu": lambda gate, up: functional.liger_swiglu(gate, up),
        "softmax": lambda x: functional.liger_softmax(x),
        "cross_entropy": lambda logits, targets: functional.liger_cross_entropy(logits, targets),
        "linear_cross_entropy": lambda x, weight, targets: functional.liger_fused_linear_cross_entropy(
            x, weight, targets
        ).to(x.dtype),
    }
    return peers[name]


QUACK = ("rmsnorm", "softmax", "cross_entropy")
PEERS: dict[str, dict[str, Callable[[], Callable[..., Any]]]] = {
    "attention": {
        "sdpa_default": partial(sdpa, "default"),
        "sdpa_cudnn": partial(sdpa, "CUDNN_ATTENTION"),
        "sdpa_flash": partial(sdpa, "FLASH_ATTENTION"),
        "flash_attention_2": partial(flash_attention, "flash_attn"),
        "flash_attention_3": partial(flash_attention, "flash_attn_interface"),
        "flash_attention_4": partial(flash_attention, "flash_attn.cute"),
    },
    **{
        name: {"liger": partial(liger, name), **({"quack": partial(quack, name)} if name in QUACK else {})}
        for name in ("rmsnorm", "swiglu", "softmax", "cross_entropy", "linear_cross_entropy")
    },
}
OVERWRITING = ("liger",)
"""Peers whose backward pass writes over its inputs: they get copies of their own."""


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    started = time.monotonic()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda":
        if not torch.cuda.is_available():
            print("triton_ops: needs a CUDA device (or --rehearse)", file=sys.stderr)
            return 2
        # Graphs are captured on another stream than the default one, and backward passes run where forward ones did.
        torch.cuda.set_stream(torch.cuda.Stream())
    from cs336_registry.bench import roofline, rows

    limits = None if options.rehearse or options.prepare else roofline.measure(device, options.dtype)
    if limits is not None:
        print(f"copy {limits.copy_bytes_per_second / 1e12:.2f} TB/s, ", end="")
        print(f"{options.dtype} product {limits.matmul_flops_per_second / 1e12:.0f} TFLOP/s", flush=True)
    with configured(options.table):
        for number, entry in enumerate(ENTRIES):
            wanted = any(name in entry.component for name in options.only) and entry.component not in options.skip
            if number < options.first or not wanted:
                continue
            if time.monotonic() - started > options.seconds:
                print(f"{entry.component} {entry.sizes}: not timed, {options.seconds:.0f} seconds are over", flush=True)
                continue
            found = bench(entry, options, device, limits)
            if options.output is not None and not options.prepare:
                rows.append(found, options.output)
            if device == "cuda":
                try:
                    torch.cuda.synchronize()
                    torch.randn(1, device=device)
                except RuntimeError as error:
                    # After an illegal access this process can't use the GPU any more, and after a capture that CUDA
                    # broke off no random numbers; another process can.
                    print(f"{entry.component}: starting again behind it: {error}".splitlines()[0], flush=True)
                    given = sys.argv[1:] if arguments is None else arguments
                    left = options.seconds - (time.monotonic() - started)
                    again = [*given, "--first", str(number + 1), "--seconds", str(max(left, 0.0))]
                    os.execv(sys.executable, [sys.executable, __file__, *again])
                torch.cuda.empty_cache()
    return 0


def configured(table: Path | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, the kernels take their configurations from `table` and, where it has none, from their own defaults."""
    if table is None:
        return contextlib.nullcontext()
    from cs336_triton import configurations

    return configurations.experiment(configurations.read_rows(json.loads(table.read_text(encoding="utf-8"))["rows"]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="only components whose name contains one of these")
    parser.add_argument("--skip", nargs="+", default=[], help="not these components")
    parser.add_argument(
        "--backends", nargs="+", default=["*"], help="only these contenders (sdpa_* stands for several)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--output", type=Path, help="JSON lines file that rows are appended to")
    parser.add_argument("--table", type=Path, help="a table of configurations, as triton_tuning.py writes it")
    parser.add_argument("--label", default="", help="written into every row, say 'tuned'")
    parser.add_argument("--seconds", type=float, default=900.0, help="start no entry after this long")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of about 20 ms for each contender and direction")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help="compile everything, time nothing")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU")
    return parser.parse_args(arguments)


def bench(entry: Entry, options: argparse.Namespace, device: str, limits: Any) -> list[dict[str, Any]]:
    """Rows of every contender in every direction, printed as they are found."""
    import torch
    import triton

    from cs336_registry.bench import measurement, rows

    dtype = getattr(torch, "float32" if options.rehearse or entry.component == "adamw" else options.dtype)
    sizes = entry.toy if options.rehearse else entry.sizes
    origin = {
        **rows.environment(device),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "benchmark": "triton_ops",
        "label": options.label,
        "component": entry.component,
        "workload": "x".join(str(size) for size in sizes),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        **({"roofline": limits.to_dict()} if limits is not None else {}),
    }
    optimizing = entry.component == "adamw"
    given = {} if optimizing else tensors(entry.component, sizes, dtype, device)
    parameters = optimizer_parameters(sizes, device) if optimizing else []
    found: list[dict[str, Any]] = []
    runs: dict[tuple[str, str], tuple[Callable[[], Any], int]] = {}
    noted: dict[tuple[str, str], dict[str, Any]] = {}

    def unable(name: str, error: Exception) -> dict[str, Any]:
        kind = "absent" if isinstance(error, ImportError) else "failed"
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(f"{entry.component} {origin['workload']} {name}: {kind}: {reason}", flush=True)
        return {**origin, "backend": name, kind: reason}

    for name, factory in (OPTIMIZERS if optimizing else contenders(entry.component, device)).items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in options.backends):
            continue
        try:
            function = factory if optimizing else factory()
            judge = optimizer_verdict if optimizing else verdict
            if wrong := judge(entry, function, dtype, device):
                raise AssertionError(wrong)
            own = {key: value.clone() for key, value in given.items()} if name in OVERWRITING else given
            ways = {"both": function(parameters)} if optimizing else directions(function, own, dict(entry.options))
            if entry.component == "linear_cross_entropy":
                # Which part of the work belongs to which pass differs from one contender to the next.
                ways.pop("backward", None)
            for way, call in ways.items():
                noted[name, way] = {"extra_memory": extra_memory(call, device)}
                if device == "cuda" and not options.prepare:
                    noted[name, way]["host_seconds"] = measurement.host_seconds(call)
                    call, noted[name, way]["timing"] = as_graph(call)
                runs[name, way] = call, 1 if options.rehearse else calls_for(call, device)
        except Exception as error:
            found.append(unable(name, error))
    if options.prepare:
        return found
    timed: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    for _ in range(2 if options.rehearse else options.rounds):
        for (name, way), (call, count) in list(runs.items()):
            if len(timed[name, way]) >= 3 and sum(timed[name, way]) * count > LONGEST:
                continue
            try:
                timed[name, way].append(measurement.seconds_per_call(call, count, device))
            except Exception as error:
                found.append(unable(name, error))
                del runs[name, way], timed[name, way]
    for (name, direction), seconds in timed.items():
        row = {
            **origin,
            "backend": name,
            "direction": direction,
            **noted[name, direction],
            **figures(entry, sizes, direction, seconds, given, limits),
        }
        found.append(row)
        share = f" {row['share_of_limit']:.1%} of {row['limit']}" if "limit" in row else ""
        rate = f" {row['flops_per_second'] / 1e12:.0f} TFLOP/s" if row.get("flops_per_second") else ""
        print(
            f"{entry.component} {origin['workload']} {name} {direction}: {row['seconds'] * 1e6:.1f} us{share}{rate}"
            f" ({row.get('timing', 'cpu')}, host {row.get('host_seconds', 0.0) * 1e6:.0f} us)",
            flush=True,
        )
    return found


def as_graph(call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """The call to time, and how it is timed: "graph", or "calls" where it can't be captured."""
    import torch

    from cs336_registry.cuda_graph import captured

    try:
        # A call that waits for the card would break the capture off: this says so before.
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return captured(call), "graph"
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"  not captured: {error}".splitlines()[0][:200], flush=True)
        return call, "calls"


def calls_for(call: Callable[[], Any], device: str) -> int:
    """How many calls make a round of 20 ms."""
    from cs336_registry.bench import measurement

    return measurement.calls_for(call, device, budget=0.02)


def extra_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes that one call takes beyond what is allocated already, at its peak."""
    import torch

    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def optimizer_parameters(sizes: tuple[int, ...], device: str) -> list[Any]:
    """The float32 parameters of a Transformer of these (layers, d_model, d_ff, vocab), with gradients."""
    import torch

    layers, d, d_ff, vocab = sizes
    block = [(d, d)] * 4 + [(d_ff, d), (d, d_ff), (d_ff, d), (d,), (d,)]
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for shape in [(vocab, d), *block * layers, (d,), (vocab, d)]:
        parameter = torch.nn.Parameter(torch.randn(shape, generator=generator, device=device))
        parameter.grad = torch.randn(shape, generator=generator, device=device)
        found.append(parameter)
    return found


def triton_fused(parameters: list[Any]) -> Callable[[], Any]:
    adamw = importlib.import_module("cs336_triton.adamw").AdamW
    return adamw(parameters, lr=1e-3, weight_decay=0.1, max_l2_norm=1.0).step


def triton_separate(parameters: list[Any]) -> Callable[[], Any]:
    optimizer = importlib.import_module("cs336_triton.adamw").AdamW(parameters, lr=1e-3, weight_decay=0.1)
    clip = importlib.import_module("cs336_triton.gradient_clipping").gradient_clipping
    return lambda: (clip(parameters, 1.0), optimizer.step())


def torch_separate(parameters: list[Any], **implementation: bool) -> Callable[[], Any]:
    import torch

    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, **implementation)
    return lambda: (torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True), optimizer.step())


OPTIMIZERS: dict[str, Callable[[list[Any]], Callable[[], Any]]] = {
    "triton": triton_fused,
    "triton_separate": triton_separate,
    "torch_fused": partial(torch_separate, fused=True),
}
"""Norm, clipping and AdamW of all parameters: parameters with gradients to a callable that takes a step."""


def optimizer_verdict(entry: Entry, factory: Callable[..., Any], dtype: Any, device: str) -> str:
    """Empty where a step leaves the parameters where PyTorch's loop in float64 puts them."""
    sizes = entry.toy if device == "cpu" else entry.judged
    found, expected = (optimizer_parameters(sizes, device) for _ in range(2))
    for parameter in expected:
        grad, parameter.grad = parameter.grad.double(), None
        parameter.data = parameter.data.double()
        parameter.grad = grad
    factory(found)()
    torch_separate(expected, foreach=False)()
    worst = max(float((one - other).abs().max().detach()) for one, other in zip(found, expected, strict=True))
    return "" if worst < 1e-6 else f"a parameter is {worst:.2g} away from PyTorch's in float64"


def verdict(entry: Entry, function: Callable[..., Any], dtype: Any, device: str) -> str:
    """Empty where values and gradients are within the contract's tolerance, else what is wrong."""
    import torch

    import cs336_registry as registry
    from cs336_registry.compare import assert_within

    contract = registry.contract(entry.component)
    given = tensors(entry.component, entry.toy if device == "cpu" else entry.judged, dtype, device)
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    defaults = {"eps": 1e-5} if entry.component in ("rmsnorm", "add_rmsnorm") else {}
    defaults |= {"dim": -1} if entry.component == "softmax" else {}
    defaults |= {"reduction": "mean"} if "cross_entropy" in entry.component else {}
    defaults |= {"token_positions": None} if entry.component == "rope" else {}
    oracle = partial(contract.oracle, **defaults)
    try:
        results = [
            gradients_of(call, values, dict(entry.options))
            for call, values in ((oracle, wide), (oracle, given), (function, given))
        ]
        tolerances = (contract.tolerance, contract.gradient_tolerance)
        for part, tolerance in zip(range(2), tolerances, strict=True):
            truth, plain, found = (result[part] for result in results)
            assert_within(found, truth, plain, tolerance, what=("result", "gradients")[part])
    except AssertionError as error:
        return str(error)
    finally:
        if device == "cuda":
            torch.cuda.synchronize()
    return ""


def gradients_of(function: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Any]:
    leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in given.items()}
    for name in ("cos", "sin"):
        if name in leaves:
            leaves[name].requires_grad_(False)
    import torch

    results = function(**leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    # Cosines of the position: the same numbers in every dtype, and no sum over rows of a softmax vanishes.
    grads = [torch.arange(r.numel(), device=r.device).cos().to(r.dtype).reshape(r.shape) for r in results]
    gradients = torch.autograd.grad(results, wanted, grads)
    return [result.detach() for result in results], list(gradients)


def directions(
    function: Callable[..., Any], given: dict[str, Any], options: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Forward alone without gradients, backward alone over one kept graph, and both."""
    import torch

    leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in given.items()}
    for name in ("cos", "sin"):
        if name in leaves:
            leaves[name].requires_grad_(False)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def run() -> tuple[Any, ...]:
        results = function(**leaves, **options)
        return results if isinstance(results, tuple) else (results,)

    kept = run()
    grads = [torch.randn_like(result) for result in kept]

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        torch.autograd.grad(run(), wanted, grads)

    try:
        torch.autograd.grad(kept, wanted, grads, retain_graph=True)
    except RuntimeError:
        # A peer that writes its gradient over saved tensors can only be run forward and backward together.
        return {"forward": forward, "both": both}
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(kept, wanted, grads, retain_graph=True),
        "both": both,
    }


def figures(
    entry: Entry, sizes: tuple[int, ...], direction: str, seconds: list[float], given: dict[str, Any], limits: Any
) -> dict[str, Any]:
    """Median and quartiles, and the share of the limit that binds."""
    low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    found: dict[str, Any] = {"seconds": median, "seconds_low": low, "seconds_high": high, "rounds": len(seconds)}
    if limits is None:
        return found
    parts = [direction in ("forward", "both"), direction in ("backward", "both")]
    if entry.component == "adamw":
        # Norm: 4 bytes of gradient. Step: gradient once more; weight and two moments read and written.
        layers, d, d_ff, vocab = sizes
        moved = 32.0 * (2 * vocab * d + layers * (4 * d * d + 3 * d * d_ff + 2 * d) + d)
    else:
        size = max(tensor.nbytes for tensor in given.values())
        moved = size * (parts[0] * entry.forward_tensors + parts[1] * entry.backward_tensors)
    flops = parts[0] * entry.forward_flops(*sizes) + parts[1] * entry.backward_flops(*sizes)
    shares = {
        "copy": moved / median / limits.copy_bytes_per_second,
        "matmul": flops / median / limits.matmul_flops_per_second,
    }
    limit = max(shares, key=lambda name: shares[name])
    return found | {
        "bytes_per_second": moved / median,
        "flops_per_second": flops / median,
        "limit": limit,
        "share_of_limit": shares[limit],
    }


if __name__ == "__main__":
    sys.exit(main())
