"""Check and time every configuration of the Hopper forward kernel, each in a process of its own with a time limit.

    python benchmarks/attention_trial.py                # on a machine with a Hopper card
    python benchmarks/attention_trial.py --compile      # anywhere: registers, spills and shared memory

Needs torch and triton alone. All processes import and compile side by side; then they take turns on the card, one at a
time, so that one that hangs costs its time limit and nothing else. `before` is this backend without the new kernel,
`sdpa` PyTorch's default, timed in the same process as what it is compared with.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]

SHAPES = (
    # batch, heads, kv_heads, queries, keys, d, causal
    (1, 1, 1, 128, 128, 64, False),
    (1, 1, 1, 128, 128, 64, True),
    (1, 2, 2, 256, 256, 64, True),
    (2, 3, 3, 1000, 1000, 64, True),
    (1, 4, 2, 129, 513, 64, False),
    (1, 2, 2, 640, 200, 64, True),
    (1, 2, 1, 200, 640, 64, True),
    (3, 8, 2, 1537, 1537, 64, True),
    (2, 96, 96, 512, 512, 64, True),
    (1, 1, 1, 128, 128, 128, False),
    (1, 1, 1, 128, 128, 128, True),
    (1, 2, 2, 384, 384, 128, True),
    (2, 3, 3, 1000, 1000, 128, True),
    (1, 4, 2, 129, 513, 128, False),
    (1, 2, 2, 640, 200, 128, True),
    (1, 2, 1, 200, 640, 128, True),
    (3, 8, 2, 1537, 1537, 128, True),
    (2, 96, 96, 512, 512, 128, True),
)
TIMED = (
    (1, 16, 16, 8192, 128, True),
    (4, 16, 4, 8192, 128, True),
    (4, 16, 16, 2048, 128, True),
    (1, 16, 16, 8192, 128, False),
    (4, 32, 32, 4096, 64, True),
    (16, 12, 12, 1024, 64, True),
    (4, 32, 32, 4096, 64, False),
)
"""Batch, heads, kv_heads, length, d, causal."""


def variants() -> dict[str, tuple[int, object]]:
    """Name to (d, configuration)."""
    from cs336_triton.attention_hopper import candidate_configurations

    return {f"d{d}_{name_of(chosen)}": (d, chosen) for d in (128, 64) for chosen in candidate_configurations(d)}


def name_of(chosen) -> str:
    flags = ("_overlap" if chosen["OVERLAP"] else "") + ("_turns" if chosen["TURNS"] else "")
    return f"{chosen['CONSUMERS']}x64x{chosen['BLOCK_N']}_{chosen['STAGES']}stages{flags}"


def make(batch, heads, kv_heads, queries, keys, d, dtype, device, seed=0, transposed=True):
    """q, k, v as views (batch, heads, length, d), in the memory order of a projection unless told otherwise."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)

    def one(heads, length):
        shape = (batch, length, heads, d) if transposed else (batch, heads, length, d)
        x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return x.transpose(1, 2) if transposed else x

    return one(heads, queries), one(kv_heads, keys), one(kv_heads, keys)


def reference(q, k, v, is_causal, scale):
    """The output and the LSE in float64."""
    import torch

    group = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(group, 1)
    v = v.double().repeat_interleave(group, 1)
    scores = q.double() @ k.transpose(2, 3) * scale
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def run(chosen, q, k, v, is_causal, scale):
    import torch
    from cs336_triton.attention_hopper import run_configuration

    output = torch.full_like(q, float("nan"))
    lse = torch.full(q.shape[:3], float("nan"), dtype=torch.float32, device=q.device)
    run_configuration(q, k, v, output, lse, is_causal, scale, chosen)
    return output, lse


def check(chosen, d, say) -> None:
    import torch

    worst = [0.0, 0.0, 0.0]
    for number, (batch, heads, kv_heads, queries, keys, width, is_causal) in enumerate(SHAPES):
        if width != d:
            continue
        for dtype in (torch.bfloat16, torch.float16):
            if dtype == torch.float16 and number % 3:
                continue
            q, k, v = make(batch, heads, kv_heads, queries, keys, d, dtype, "cuda", number, transposed=number % 2 == 0)
            # Logits far apart: the running maximum moves.
            q = q * (1 + number % 4)
            scale = d**-0.5
            first = run(chosen, q, k, v, is_causal, scale)
            torch.cuda.synchronize()
            again = run(chosen, q, k, v, is_causal, scale)
            expected, expected_lse = reference(q, k, v, is_causal, scale)
            error = (first[0].double() - expected).norm().item() / expected.norm().item()
            largest = (first[0].double() - expected).abs().max().item()
            lse_error = (first[1].double() - expected_lse).abs().max().item()
            limit = 6e-3 if dtype == torch.bfloat16 else 8e-4
            label = f"{(batch, heads, kv_heads, queries, keys, d)} {'causal' if is_causal else 'full'} {dtype}"
            # Written so that a NaN fails.
            if not (error < limit and lse_error < 1e-4 * (1 + expected_lse.abs().max().item())):
                wrong = ((first[0].double() - expected).abs().amax(-1) < 0.05).logical_not().nonzero()
                say(
                    f"WRONG {label}: relative error {error:.2e} (limit {limit}), largest {largest:.2e}, LSE "
                    f"{lse_error:.2e}; rows off: {len(wrong)}, first {wrong[:3].tolist()}, last {wrong[-1:].tolist()}"
                )
                raise SystemExit(1)
            if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
                say(f"NOT REPEATABLE {label}")
                raise SystemExit(1)
            worst = [max(a, b) for a, b in zip(worst, (error / limit, largest, lse_error), strict=True)]
    say(f"right: {worst[0]:.2f} of the limit, largest error {worst[1]:.1e}, LSE {worst[2]:.1e}")


def timed(function) -> float:
    from triton.testing import do_bench

    return do_bench(function, warmup=15, rep=60, return_mode="median")


def time_all(call, d, say) -> None:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    for batch, heads, kv_heads, length, width, is_causal in TIMED:
        if d not in (width, None):
            continue
        q, k, v = make(batch, heads, kv_heads, length, length, width, torch.bfloat16, "cuda")
        work = (2 if is_causal else 4) * batch * heads * length * length * width / 1e9
        ours = timed(lambda q=q, k=k, v=v, c=is_causal: call(q, k, v, c))
        torchs = timed(
            lambda q=q, k=k, v=v, c=is_causal, g=heads != kv_heads: scaled_dot_product_attention(
                q, k, v, is_causal=c, enable_gqa=g
            )
        )
        say(
            f"{(batch, heads, kv_heads, length, width)} {'causal' if is_causal else 'full':6} "
            f"{ours:.3f} ms {work / ours:4.0f} TFLOP/s   sdpa {torchs:.3f} ms {work / torchs:4.0f}"
        )


def host_time(chosen, d, say) -> None:
    import torch
    from cs336_triton.attention_hopper import run_configuration

    q, k, v = make(1, 2, 2, 128, 128, d, torch.bfloat16, "cuda")
    output, lse = torch.empty_like(q), torch.empty(q.shape[:3], device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(200):
        run_configuration(q, k, v, output, lse, True, 0.1, chosen)
    passed = time.perf_counter() - start
    torch.cuda.synchronize()
    say(f"host {passed / 200 * 1e6:.0f} microseconds a launch")


def compile_variant(d, chosen, is_causal=True, length=4096, dtype=None) -> str:
    import torch
    from cs336_triton.attention_hopper import run_configuration
    from cs336_triton.cross_compilation import CARDS, compile_launch, launches_of

    dtype = dtype or torch.bfloat16
    q, k, v = (torch.empty(2, length, 16, d, dtype=dtype, device="meta").transpose(1, 2) for _ in range(3))
    lse = torch.empty(2, 16, length, device="meta")
    launch = launches_of(
        lambda: run_configuration(q, k, v, torch.empty_like(q), lse, is_causal, d**-0.5, chosen), CARDS[90]
    )[0]
    start = time.perf_counter()
    made = compile_launch(launch, CARDS[90])
    return (
        f"{made.registers} registers, {made.local_memory} bytes spilled, {made.shared_memory} of shared memory, "
        f"{made.ptx.count('wgmma.mma_async')} wgmma, {time.perf_counter() - start:.1f} s"
    )


def compile_before(call) -> None:
    import torch
    from cs336_triton.cross_compilation import CARDS, compile_launch, launches_of

    for batch, heads, kv_heads, length, d, is_causal in TIMED:
        q, k, v = (
            torch.empty(batch, length, h, d, dtype=torch.bfloat16, device="meta").transpose(1, 2)
            for h in (heads, kv_heads, kv_heads)
        )
        for launch in launches_of(lambda q=q, k=k, v=v, c=is_causal: call(q, k, v, c), CARDS[90]):
            compile_launch(launch, CARDS[90])


def worker(name: str) -> int:
    def say(text: str) -> None:
        print(f"{name:40} {text}", flush=True)

    import torch

    try:
        if name == "before":
            from cs336_triton import attention, attention_hopper

            attention_hopper.serves = lambda *_: False

            def call(q, k, v, is_causal):
                return attention.forward(q, k, v, None, None, is_causal, q.shape[3] ** -0.5)

            compile_before(call)
            torch.zeros(1, device="cuda")
            print("ready", flush=True)
            sys.stdin.readline()
            time_all(call, None, say)
            return 0
        from cs336_triton.attention_hopper import run_configuration

        d, chosen = variants()[name]
        for is_causal in (True, False):
            for dtype in (torch.bfloat16, torch.float16):
                made = compile_variant(d, chosen, is_causal, 4096, dtype)
                if is_causal and dtype == torch.bfloat16:
                    say(made)
        torch.zeros(1, device="cuda")
        print("ready", flush=True)
        sys.stdin.readline()
        check(chosen, d, say)

        def call(q, k, v, is_causal):
            output = torch.empty_like(q)
            lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
            run_configuration(q, k, v, output, lse, is_causal, 1 / math.sqrt(d), chosen)
            return output

        time_all(call, d, say)
        host_time(chosen, d, say)
        return 0
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        say("FAILED\n" + "\n".join(traceback.format_exc().strip().splitlines()[-8:]))
        return 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="compile only")
    parser.add_argument("--only", nargs="+", default=[""], help="variants whose name contains one of these")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds a variant may hold the card")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options.worker)
    names = [name for name in variants() if any(part in name for part in options.only)]
    if options.compile:
        import torch

        for name in names:
            d, chosen = variants()[name]
            for is_causal, length, dtype in ((True, 4096, torch.bfloat16), (False, 4001, torch.float16)):
                print(f"{name:40} {compile_variant(d, chosen, is_causal, length, dtype)}", flush=True)
        return 0
    import torch
    import triton

    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, flush=True)
    start = time.perf_counter()
    running = {name: Running(name) for name in (*names, "before")}
    failures = 0
    for name, process in running.items():
        failures += process.finish(options.limit)
        print(f"-- {name}: {time.perf_counter() - start:.0f} s since the start", flush=True)
    return 1 if failures else 0


class Running:
    """A worker: it says that it is ready, and goes on to the card when told to."""

    def __init__(self, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.name = name
        self.ready = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            if line == "ready\n":
                self.ready.set()
            else:
                print(line, end="", flush=True)
        self.ready.set()

    def finish(self, limit: float) -> bool:
        """Let it go to the card; whether it failed."""
        if not self.ready.wait(60.0):
            print(f"{self.name:40} FAILED: not ready after a minute", flush=True)
        elif self.process.poll() is None:
            try:
                self.process.stdin.write("go\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                pass
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            print(f"{self.name:40} HUNG: ended after {limit:.0f} s on the card", flush=True)
            self.process.kill()
            code = 1
        self.reader.join(2.0)
        return code != 0


if __name__ == "__main__":
    sys.exit(main())
