"""Every kernel of the backend, in every dtype and configuration used in earnest, compiles for cards that are not here.

This needs no GPU: Triton compiles to machine code for Ampere, Hopper and Blackwell anywhere. What a GPU would be asked
for is read from the result: shared memory, registers spilled to local memory, tensor-core instructions. It does not
show that a kernel computes the right thing there; the interpreter and, where there is one, a GPU do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROCESSES = min(2, os.cpu_count() or 1)

SPILLS = {
    ("attention_query_gradient_kernel", "float32_d128"): 256,
    ("attention_query_gradient_kernel", "bfloat16_d256"): 8,
    ("attention_key_gradient_kernel", "bfloat16_d128_grouped"): 32,
    ("attention_key_gradient_hopper_kernel", "d128"): 64,
    ("backward_kernel", "rmsnorm_backward_float32_16384"): 16,
    ("backward_kernel", "add_rmsnorm_backward_bfloat16_16384"): 8,
    ("backward_kernel", "add_rmsnorm_backward_float16_16384"): 8,
    ("backward_kernel", "softmax_backward_bfloat16_32768"): 40,
    ("backward_kernel", "softmax_backward_float16_32768"): 40,
    ("pipelined_forward_kernel", "softmax_forward_float32_32768"): 16,
    ("walking_input_gradient_kernel", "rmsnorm_backward_float32_65536"): 8,
}
"""Known exceptions, in bytes per thread. float32 is multiplied without tensor cores, whose operands then live in
registers: at 128 features the dQ kernel keeps two tiles there, and no tile size avoids a small spill. The next two are
Triton 3.6's alone. Hopper's own kernel of dK and dV spills scalars, of which its loop reads back up to ten. A row of
16384 fills the registers (with add_rmsnorm, the residual's gradient beside it), and so does one of 32768 in softmax;
spilling a little of it is cheaper than reading it twice; walked, float32 spills two registers on Blackwell."""

SPILLS_ELSEWHERE = {
    80: {
        ("attention_forward_kernel", "float32_d64_full"): 16,
        ("attention_forward_kernel", "bfloat16_d64_documents"): 8,
        ("attention_forward_kernel", "bfloat16_d128_documents"): 8,
        ("attention_forward_kernel", "bfloat16_d128_mask"): 32,
        ("attention_query_gradient_kernel", "bfloat16_d64_documents"): 8,
        ("attention_query_gradient_kernel", "bfloat16_d64_mask"): 48,
        ("attention_key_gradient_kernel", "bfloat16_d64_mask_odd"): 24,
        ("attention_key_gradient_kernel", "bfloat16_d64_grouped"): 24,
    },
    100: {
        ("attention_delta_kernel", "d64_full"): 8,
        ("attention_delta_kernel", "d128_"): 8,
        ("attention_delta_kernel", "bfloat16_d80_causal"): 8,
        ("attention_forward_kernel", "bfloat16_d64_documents"): 312,
        ("attention_query_gradient_kernel", "bfloat16_d128_odd"): 8,
        ("attention_key_gradient_kernel", "bfloat16_d128_grouped"): 328,
    },
}
"""What Triton 3.7.1 spills besides for Ampere and Blackwell, for which the tiles were not chosen. On Blackwell no tile
keeps dK and dV of grouped heads in registers (304 to 536 bytes)."""


@pytest.fixture(scope="module")
def compiled(request) -> list[dict]:
    """One row per distinct production launch, compiled for the capability that the test is parametrised with."""
    if request.param not in (90, *(request.config.getoption("compile_for", None) or ())):
        pytest.skip(f"compiling everything again takes minutes: pytest tests/triton --compile-for={request.param}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tests.triton.compile_production", str(request.param)]
    running = [
        subprocess.Popen(
            [*command, str(share), str(PROCESSES)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in range(PROCESSES)
    ]
    rows = []
    for process in running:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        rows += [json.loads(line) for line in output.splitlines()]
    return rows


def shared_memory_limit(capability: int) -> int:
    from cs336_triton.cross_compilation import CARDS

    return CARDS[capability].shared_memory


def allowed_spill(row: dict, capability: int) -> int:
    known = SPILLS | SPILLS_ELSEWHERE.get(capability, {})
    return max(
        (size for (kernel, part), size in known.items() if row["kernel"] == kernel and part in row["label"]), default=0
    )


def check(rows: list[dict], capability: int) -> None:
    failed = [f"{row['label']} {row['kernel']}: {row['error']}" for row in rows if "error" in row]
    assert not failed, "do not compile:\n" + "\n".join(failed)
    limit = shared_memory_limit(capability)
    too_large = [row for row in rows if row["shared_memory"] > limit]
    assert not too_large, f"more than {limit} bytes of shared memory: {too_large}"
    spilled = [row for row in rows if row["local_memory"] > allowed_spill(row, capability)]
    assert not spilled, f"spill registers to local memory: {spilled}"


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [90], indirect=True)
def test_hopper(compiled):
    modules = {row["label"].partition(":")[0] for row in compiled}
    assert {"attention", "rmsnorm", "softmax", "cross_entropy", "adamw"} <= modules
    check(compiled, 90)
    attention = [
        row
        for row in compiled
        if row["label"].startswith("attention:bfloat16")
        and not any(part in row["kernel"] for part in ("delta", "statistics"))
    ]
    assert len(attention) >= 20
    without = [row for row in attention if row["tensor_cores"] != "wgmma"]
    assert not without, f"bfloat16 attention without Hopper's warpgroup products: {without}"
    written_for_it = [row for row in compiled if "hopper_kernel" in row["kernel"]]
    assert len({row["kernel"] for row in written_for_it}) == 4 and len(written_for_it) >= 20
    without = [row for row in written_for_it if not (row["warp_roles"] and row["copy_engine"])]
    assert not without, f"without registers handed over, or without the copy engine: {without}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "capability"), [(80, 80), (100, 100)], ids=["ampere", "blackwell"], indirect=["compiled"]
)
def test_other_cards(compiled, capability):
    check(compiled, capability)


def test_the_cubin_is_read_as_the_assembler_reports():
    """Registers and spills from the ELF file equal what `ptxas -v` prints for the same PTX."""
    script = """
import re, subprocess, tempfile, pathlib
from triton import knobs
from cs336_triton.cross_compilation import CARDS, compile_launch, launches_of
from cs336_triton.attention import production_calls
call = dict(production_calls())["bfloat16_d64_causal"]
launch = launches_of(call, CARDS[90])[0]
artifact = compile_launch(launch, CARDS[90])
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "kernel.ptx"
    path.write_text(artifact.ptx)
    report = subprocess.run([knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(path) + ".o"],
                            capture_output=True, text=True, check=True).stderr
assert int(re.search(r"Used (\\d+) registers", report)[1]) == artifact.registers, (report, artifact.registers)
assert int(re.search(r"(\\d+) bytes stack frame", report)[1]) == artifact.local_memory, (report, artifact.local_memory)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


def test_float_arguments_keep_the_digits_of_the_accumulator():
    """Attention's scales: float64 in float64 kernels, masks included; elsewhere rounded once and out of the loops."""
    script = """
import torch
from cs336_triton.attention import _forward_backward
from cs336_triton.cross_compilation import CARDS, compile_launch, launches_of
for dtype in (torch.float64, torch.bfloat16):
    for launch in launches_of(lambda: _forward_backward(1, 1, 1, 64, 16, dtype, False, "mask"), CARDS[90]):
        lines = compile_launch(launch, CARDS[90]).ptx.splitlines()
        assert not any(".param .f32" in line for line in lines), launch.kernel
        scales = sum(".param .f64" in line for line in lines)
        assert scales == sum(name.startswith("scale") for name in launch.kernel.arg_names), launch.kernel
        if dtype == torch.float64:
            assert not any("cvt.f64.f32" in line or "cvt.rn.f32.f64" in line for line in lines), launch.kernel
        else:
            assert sum(".f64" in line for line in lines) == 2 * scales, launch.kernel
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
