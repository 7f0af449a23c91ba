"""Attention's backward pass on one Hopper GPU: what is right, and what is fastest, kernel by kernel.

    PYTHONPATH=.:backends python benchmarks/attention_backward_trial.py [--only dq128 gluon] [--timeout 35]
    PYTHONPATH=.:backends python benchmarks/attention_backward_trial.py --compile        (needs no GPU)

Needs torch and Triton. First every kernel of every variant is compiled, in parallel processes. Then each Gluon variant
computes gradients in a process of its own, which is ended after `--timeout` seconds (a deadlock hangs for ever), and
compares them with float64: odd lengths, fewer and more keys than queries, grouped heads, causal and full, inputs that
are views of larger tensors full of NaN, outputs poisoned with NaN, runs repeated bit for bit. Last, one process times
the kernels of every variant that was right, those of the plain Triton kernels, and PyTorch's SDPA.

A variant is <kernel><width>/<way>-<tile>...: `dq128/gluon-128x3` has 128 features, tiles of 128 keys and 3 buffers,
with `-lag` its last product runs one tile behind, with `-reg` the tiles that stay are kept in registers, with
`-unpinned` the compiler may put off the exponentials.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

SHAPES = ((1, 16, 16, 8192, 128), (4, 16, 4, 8192, 128), (4, 32, 32, 4096, 64), (16, 12, 12, 1024, 64))
"""Batch, query heads, key heads, length and features of what is timed, causal."""
CASES = (
    # batch, heads, kv_heads, queries, keys, is_causal
    (2, 3, 3, 257, 257, True),
    (1, 2, 2, 1024, 1024, True),
    (1, 4, 1, 300, 450, True),
    (1, 4, 1, 450, 300, True),
    (2, 2, 2, 129, 1000, False),
    (1, 2, 2, 1000, 1, False),
    (1, 8, 8, 2048, 2048, True),
)


@dataclass(frozen=True)
class Variant:
    kernel: str
    width: int
    gluon: bool
    constants: tuple[tuple[str, Any], ...]
    num_warps: int = 4
    num_stages: int = 1

    @property
    def name(self) -> str:
        constants = dict(self.constants)
        if self.gluon:
            tile = constants.get("BLOCK_N", constants.get("BLOCK_M"))
            ways = ("-lag" if constants["LAG"] else "") + ("-reg" if constants["FIXED_IN_REGISTERS"] else "")
            ways += "" if constants.get("PIN", True) else "-unpinned"
            return f"{self.kernel}{self.width}/gluon-{tile}x{constants['STAGES']}{ways}"
        tiles = f"{constants['BLOCK_M']}x{constants['BLOCK_N']}-w{self.num_warps}-s{self.num_stages}"
        return f"{self.kernel}{self.width}/triton-{tiles}{'-tma' if constants['DESCRIPTORS'] else ''}"

    @property
    def table_name(self) -> str:
        name = {"dq": "attention_query_gradient", "dkv": "attention_key_gradient"}[self.kernel]
        return name + ("_hopper" if self.gluon else "")

    def table(self) -> dict:
        """What makes the backend choose this configuration, for both dtypes, causal and full."""
        from cs336_triton.configurations import Configuration

        chosen = Configuration.of(self.num_warps, self.num_stages, **dict(self.constants))
        return {
            (self.table_name, dtype, f"d{self.width}{causal}"): chosen
            for dtype in ("bfloat16", "float16")
            for causal in ("", "_causal")
        }


def gluon(kernel: str, width: int, rows: int, stages: int, lag: bool, in_registers: bool, pin: bool = True) -> Variant:
    constants = {"STAGES": stages, "LAG": lag, "FIXED_IN_REGISTERS": in_registers}
    constants |= {"BLOCK_N": rows, "PIN": pin} if kernel == "dq" else {"BLOCK_M": rows}
    return Variant(kernel, width, True, tuple(sorted(constants.items())))


def plain(kernel: str, width: int, m: int, n: int, num_warps: int, num_stages: int, descriptors: bool) -> Variant:
    constants = (("BLOCK_M", m), ("BLOCK_N", n), ("DESCRIPTORS", descriptors), ("WARP_SPECIALIZE", False))
    return Variant(kernel, width, False, constants, num_warps, num_stages)


VARIANTS = (
    gluon("dkv", 128, 64, 2, False, False),
    gluon("dkv", 128, 64, 3, False, False),
    gluon("dkv", 128, 64, 3, True, False),
    gluon("dkv", 128, 32, 4, True, False),
    gluon("dkv", 64, 64, 3, False, False),
    gluon("dkv", 64, 64, 3, False, True),
    gluon("dkv", 64, 64, 4, True, False),
    gluon("dkv", 64, 64, 4, True, True),
    gluon("dq", 128, 128, 2, False, False),
    gluon("dq", 128, 128, 2, False, False, False),
    gluon("dq", 128, 64, 3, False, False),
    gluon("dq", 128, 64, 3, False, True),
    gluon("dq", 128, 64, 4, True, False),
    gluon("dq", 128, 64, 4, True, True),
    gluon("dq", 64, 128, 3, False, False),
    gluon("dq", 64, 128, 3, False, False, False),
    gluon("dq", 64, 128, 3, False, True),
    gluon("dq", 64, 128, 4, True, False),
    gluon("dq", 64, 64, 4, True, False),
    gluon("dq", 64, 64, 4, True, True),
    plain("dkv", 128, 32, 128, 8, 3, False),
    plain("dkv", 128, 64, 128, 8, 2, False),
    plain("dkv", 128, 64, 128, 8, 2, True),
    plain("dkv", 128, 64, 128, 8, 3, True),
    plain("dkv", 128, 64, 64, 4, 2, True),
    plain("dkv", 64, 64, 128, 8, 2, False),
    plain("dkv", 64, 64, 128, 8, 3, True),
    plain("dkv", 64, 128, 128, 8, 2, True),
    plain("dkv", 64, 64, 64, 4, 3, True),
    plain("dq", 128, 128, 64, 8, 2, False),
    plain("dq", 128, 128, 64, 8, 3, True),
    plain("dq", 128, 128, 128, 8, 2, True),
    plain("dq", 128, 64, 64, 4, 3, True),
    plain("dq", 64, 128, 128, 8, 2, False),
    plain("dq", 64, 128, 128, 8, 3, True),
    plain("dq", 64, 128, 64, 8, 3, True),
    plain("dq", 64, 64, 64, 4, 3, True),
)


def main() -> int:
    options = parse()
    if options.check:
        return check(next(variant for variant in VARIANTS if variant.name == options.check))
    if options.time is not None:
        return time_all([variant for variant in VARIANTS if variant.name in options.time])
    variants = [v for v in VARIANTS if not options.only or any(part in v.name for part in options.only)]
    if options.share is not None:
        return compile_share(variants, *options.share)
    if not options.compile and not torch.cuda.is_available():
        print("attention_backward_trial: needs a CUDA device, or --compile", file=sys.stderr)
        return 2
    start = time.monotonic()
    compile_all(variants, options)
    print(f"# compiled after {time.monotonic() - start:.0f} s", flush=True)
    if options.compile:
        return 0
    right = check_all(variants, options)
    print(f"# checked after {time.monotonic() - start:.0f} s", flush=True)
    command = [sys.executable, __file__, "--time", *(variant.name for variant in right)]
    try:
        subprocess.run(command, timeout=options.timing_timeout, check=False)
    except subprocess.TimeoutExpired:
        print(f"TIMING ended after {options.timing_timeout:.0f} s: the last kernel may hang")
    print(f"# done after {time.monotonic() - start:.0f} s", flush=True)
    return 0 if len(right) == len(variants) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="variants whose name contains one of these")
    parser.add_argument("--compile", action="store_true", help="compile for a Hopper GPU that is not here, and stop")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=35.0, help="seconds for a variant's checks, starting included")
    parser.add_argument("--timing-timeout", type=float, default=90.0)
    parser.add_argument("--share", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args()


# -- compiling


def compile_all(variants: list[Variant], options: argparse.Namespace) -> None:
    names = ["--only", *options.only] if options.only else []
    processes = [
        subprocess.Popen([sys.executable, __file__, *names, "--share", str(share), str(options.processes)])
        for share in range(options.processes)
    ]
    for process in processes:
        process.wait()


def compile_share(variants: list[Variant], share: int, shares: int) -> int:
    """Compile this process's part of the kernels, with the arguments of the checks and the timings, on meta tensors."""
    from cs336_triton.cross_compilation import CARDS, compile_launch

    seen = set()
    number = 0
    for variant in variants:
        for case in (*(CASES if variant.gluon else ()), *((*s[:3], s[3], s[3], True) for s in SHAPES)):
            if len(case) == 6 and case not in CASES and (*case[:4], variant.width) not in SHAPES:
                continue
            launches = []
            for dtype in (torch.bfloat16, torch.float16)[: 2 if case is CASES[0] else 1]:
                launches += launches_of(variant, make_tensors(case, variant.width, dtype, "meta"), case[5], CARDS[90])
            for launch in launches:
                described = str([
                    (str(a.dtype), a.data_ptr() % 16 == 0) if isinstance(a, torch.Tensor)
                    else (str(a.base.dtype), a.block_shape) if hasattr(a, "block_shape")
                    else (a % 16 == 0, a == 1, a >= 2**31) if isinstance(a, int) else type(a).__name__
                    for a in launch.arguments
                ])  # fmt: skip
                key = (launch.kernel, described, str(sorted(launch.keywords.items())))
                if key in seen:
                    continue
                seen.add(key)
                number += 1
                if number % shares != share:
                    continue
                label = f"{variant.name} {case[1]}/{case[2]} heads {'causal' if case[5] else 'full'}"
                start = time.monotonic()
                try:
                    artifact = compile_launch(launch, CARDS[90])
                except Exception as error:
                    print(f"COMPILE {label} {launch.kernel.fn.__name__}: FAILED {str(error)[-600:]}", flush=True)
                    continue
                print(
                    f"COMPILE {label} {launch.kernel.fn.__name__}: {artifact.registers} registers, "
                    f"{artifact.local_memory} bytes spilled, {artifact.shared_memory} bytes shared, "
                    f"{artifact.tensor_cores or '-'}, {time.monotonic() - start:.1f} s",
                    flush=True,
                )
    return 0


# -- launching


@contextlib.contextmanager
def without_hopper_kernels(away: bool) -> Iterator[None]:
    from cs336_triton import attention_hopper_backward

    serves = attention_hopper_backward.serves
    if away:
        attention_hopper_backward.serves = lambda *arguments: False
    try:
        yield
    finally:
        attention_hopper_backward.serves = serves


def launches_of(variant: Variant, tensors: list, is_causal: bool, card, gradients: list | None = None) -> list:
    """The statistics' launch and that of the variant's kernel, not yet run."""
    from cs336_triton import attention, configurations
    from cs336_triton.runtime import record_launches

    with (
        without_hopper_kernels(not variant.gluon),
        configurations.experiment(variant.table()),
        record_launches(card) as launches,
    ):
        found = attention.backward(
            *tensors, torch.empty(0, 2, device=tensors[0].device), None, None, is_causal, variant.width**-0.5,
            want_q=variant.kernel == "dq", want_kv=variant.kernel == "dkv",
        )  # fmt: skip
    if gradients is not None:
        gradients[:] = found
    return launches


def run(launch) -> None:
    launch.kernel[launch.grid](*launch.arguments, **launch.keywords)


def make_tensors(case: tuple, width: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """grad, q, k, v, output, lse: (batch, heads, length, width) views of (batch, length + 3, heads, width) with NaN."""
    batch, heads, kv_heads, queries, keys, _ = case

    def view(count: int, length: int) -> torch.Tensor:
        whole = torch.full((batch, length + 3, count, width), float("nan"), dtype=dtype, device=device)
        inner = whole[:, :length]
        if device != "meta":
            inner.copy_(torch.randn(inner.shape, device=device))
        return inner.transpose(1, 2)

    q, k, v, grad = view(heads, queries), view(kv_heads, keys), view(kv_heads, keys), view(heads, queries)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=device)
    return [grad, q, k, v, view(heads, queries), lse]


# -- checking


def check_all(variants: list[Variant], options: argparse.Namespace) -> list[Variant]:
    def judge(variant: Variant) -> bool:
        if not variant.gluon:
            return True
        command = [sys.executable, __file__, "--check", variant.name]
        try:
            done = subprocess.run(
                command, timeout=options.timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            output = output if isinstance(output, str) else output.decode(errors="replace")
            print(f"{output}CHECK {variant.name}: HANGS ({options.timeout:.0f} s)", flush=True)
            return False
        output = done.stdout
        if done.returncode:
            output = "\n".join(output.splitlines()[-14:]) + f"\nCHECK {variant.name}: FAILED ({done.returncode})\n"
        print(output, end="", flush=True)
        return done.returncode == 0

    with concurrent.futures.ThreadPoolExecutor(max(1, options.processes)) as pool:
        judged = list(pool.map(judge, variants))
    return [variant for variant, right in zip(variants, judged, strict=True) if right]


def check(variant: Variant) -> int:
    try:
        worst = 0.0
        wrong = []
        for case in CASES:
            for dtype in (torch.bfloat16, torch.float16)[: 2 if case is CASES[0] else 1]:
                errors, notes = compare(variant, case, dtype)
                bound = 2e-2 if dtype == torch.bfloat16 else 3e-3
                worst = max([worst, *(error / bound for error in errors.values())])
                if notes or any(not error <= bound for error in errors.values()):
                    wrong.append(f"{case} {dtype}: {errors} {' '.join(notes)}")
        for line in wrong:
            print(f"CHECK {variant.name}: WRONG {line}")
        if not wrong:
            print(f"CHECK {variant.name}: right, {worst:.2f} of the bound at most")
        return 1 if wrong else 0
    except Exception:
        print("".join(traceback.format_exc().splitlines(keepends=True)[-12:]))
        return 1


def compare(variant: Variant, case: tuple, dtype: torch.dtype) -> tuple[dict[str, float], list[str]]:
    """Relative errors of the variant's gradients in the root mean square, and what else is wrong."""
    from cs336_triton.runtime import card

    torch.manual_seed(0)
    is_causal = case[5]
    tensors = make_tensors(case, variant.width, dtype, "cuda")
    grad, q, k, v, output, lse = tensors
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    group = case[1] // case[2]
    scores = leaves[0] @ leaves[1].repeat_interleave(group, 1).transpose(-1, -2) * variant.width**-0.5
    if is_causal:
        hidden = torch.ones(case[3], case[4], dtype=torch.bool, device="cuda").triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    exact = torch.softmax(scores, -1) @ leaves[2].repeat_interleave(group, 1)
    output.copy_(exact.detach())
    lse.copy_(torch.logsumexp(scores, -1).detach())
    expected = dict(zip(("q", "k", "v"), torch.autograd.grad(exact, leaves, grad.double()), strict=True))

    gradients: list[torch.Tensor] = []
    launches = launches_of(variant, tensors, is_causal, card(q.device), gradients)
    computed = {name: x for name, x in zip(("q", "k", "v"), gradients, strict=True) if x.numel()}
    notes = []
    if not any("hopper" in launch.kernel.fn.__name__ for launch in launches):
        notes.append("the Hopper kernels do not serve this")
    first: dict[str, torch.Tensor] = {}
    for repetition in range(4):
        for x in computed.values():
            x.fill_(float("nan"))
        for launch in launches:
            run(launch)
        torch.cuda.synchronize()
        for name, x in computed.items():
            if repetition == 0:
                first[name] = x.clone()
            elif not torch.equal(first[name], x):
                notes.append(f"run {repetition} has other bits in d{name}")
    errors = {}
    for name, x in first.items():
        if case[4] == 1 and name != "v":
            continue
        error = (x.double() - expected[name]).norm() / expected[name].norm().clamp_min(1e-9)
        errors[f"d{name}"] = float(error)
        if not torch.isfinite(x).all():
            notes.append(f"d{name} has {int((~torch.isfinite(x)).sum())} entries that are not finite")
    return errors, notes


# -- timing


def time_all(variants: list[Variant]) -> int:
    from cs336_triton.runtime import card
    from triton.testing import do_bench

    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    best: dict[tuple, tuple[float, str]] = {}
    whole: list[tuple] = []
    for shape in SHAPES:
        batch, heads, kv_heads, length, width = shape
        case = (batch, heads, kv_heads, length, length, True)
        label = f"B{batch} H{heads}/{kv_heads} L{length} D{width}"
        one_product = batch * heads * length * length * width / 1e9
        torch.manual_seed(0)
        grad, q, k, v = (x.contiguous() for x in make_tensors(case, width, torch.bfloat16, "cuda")[:4])
        grad, q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (grad, q, k, v))
        for way, milliseconds in time_library(grad, q, k, v).items():
            print(f"TIME {label} {way}: {milliseconds * 1e3:.1f} us, {5 * one_product / milliseconds:.0f} TFLOP/s")
        tensors = [grad, q, k, v, torch.randn_like(q), torch.full(q.shape[:3], 10.0, device="cuda")]
        for variant in variants:
            if variant.width != width:
                continue
            try:
                *statistics, launch = launches_of(variant, tensors, True, card(q.device))
                for kind, chosen in (("statistics", statistics), (variant.kernel, [launch])):
                    key = (kind, variant.gluon)
                    if kind == "statistics" and (shape, *key) in best:
                        continue
                    milliseconds = do_bench(
                        lambda chosen=chosen: [run(x) for x in chosen], 10, 40, return_mode="median"
                    )
                    way = "gluon" if variant.gluon else "triton"
                    name = f"{kind}{width}/{way}" if kind == "statistics" else variant.name
                    products = {"dq": 3, "dkv": 4}.get(kind, 0)
                    rate = f", {products * one_product / milliseconds:.0f} TFLOP/s" if products else ""
                    print(f"TIME {label} {name}: {milliseconds * 1e3:.1f} us{rate}", flush=True)
                    best[shape, *key] = min(best.get((shape, *key), (float("inf"), "")), (milliseconds, name))
            except Exception as error:
                print(f"TIME {label} {variant.name}: FAILED {str(error)[-300:]}", flush=True)
        for is_gluon in (True, False):
            parts = [best.get((shape, kind, is_gluon)) for kind in ("statistics", "dq", "dkv")]
            if all(parts):
                total = sum(part[0] for part in parts)
                names = " + ".join(part[1] for part in parts)
                print(f"BEST {label} {names}: {total * 1e3:.1f} us, {5 * one_product / total:.0f} TFLOP/s", flush=True)
        whole.append((width, label, tensors, one_product))
    # Last, because the defaults may be what hangs.
    for width, *arguments in whole:
        if defaults(width) <= {(variant.table_name, variant.constants) for variant in variants}:
            time_whole(*arguments)
        else:
            print(f"WHOLE {arguments[0]}: the defaults are not among the variants that are right")
    return 0


def defaults(width: int) -> set:
    from cs336_triton.attention_hopper_backward import default_configuration
    from cs336_triton.cross_compilation import CARDS

    return {
        (name, default_configuration(name, width, CARDS[90]).constants)
        for name in ("attention_query_gradient_hopper", "attention_key_gradient_hopper")
    }


def time_whole(label: str, tensors: list, one_product: float) -> None:
    """The whole host function with its defaults, called and replayed as a CUDA graph."""
    from cs336_triton import attention
    from triton.testing import do_bench

    statistics = torch.empty(0, 2, device="cuda")

    def call() -> tuple:
        return attention.backward(*tensors, statistics, None, None, True, tensors[1].shape[3] ** -0.5)

    try:
        milliseconds = do_bench(call, 10, 40, return_mode="median")
        start = time.perf_counter()
        for _ in range(20):
            call()
        host = (time.perf_counter() - start) / 20
        torch.cuda.synchronize()
        expected = [x.clone() for x in call()]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        graph.replay()
        torch.cuda.synchronize()
        same = all(torch.equal(x, y) for x, y in zip(expected, captured, strict=True))
        print(
            f"WHOLE {label}: {milliseconds * 1e3:.1f} us, {5 * one_product / milliseconds:.0f} TFLOP/s, host "
            f"{host * 1e6:.0f} us a call, in a CUDA graph {'the same bits' if same else 'OTHER BITS'}",
            flush=True,
        )
    except Exception as error:
        print(f"WHOLE {label}: FAILED {str(error)[-300:]}", flush=True)


def time_library(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, float]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention
    from triton.testing import do_bench

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    found = {}
    for way, chosen in (
        ("sdpa-default", contextlib.nullcontext()),
        ("sdpa-cudnn", sdpa_kernel(SDPBackend.CUDNN_ATTENTION)),
        ("sdpa-flash", sdpa_kernel(SDPBackend.FLASH_ATTENTION)),
    ):
        try:
            with chosen:
                output = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            found[way] = do_bench(
                lambda output=output: torch.autograd.grad(output, leaves, grad, retain_graph=True),
                10,
                40,
                return_mode="median",
            )
        except Exception as error:
            print(f"TIME {way}: FAILED {str(error)[-200:]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
