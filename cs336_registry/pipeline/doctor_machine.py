"""The doctor's look at the machine: software, devices, cores, environment, plugins, compiler."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cs336_registry as registry

from ..errors import RegistryError, suggestion
from ..machine import detect
from .configuration import Configuration
from .doctor import Finding

GIB = 2**30
TESTED = {"python": ((3, 11), (3, 14)), "torch": ((2, 11), None), "triton": ((3, 6), (3, 9))}
"""The oldest and newest release that the project supports (None: no newest one is known to fail)."""
OPTIONAL = {
    "numba": "the fast tokenizer backend: pip install 'cs336-registry[numba]'",
    "tokenizers": "export of tokenizers: pip install 'cs336-registry[export]'",
    "transformers": "export and import of models: pip install 'cs336-registry[export]'",
    "zstandard": ".zst inputs: pip install 'cs336-registry[files]'",
    "pyarrow": ".parquet inputs: pip install 'cs336-registry[files]'",
    "tensorboard": "metrics.sinks: pip install 'cs336-registry[tensorboard]'",
}


def versions() -> Iterator[Finding]:
    yield _release("python", platform.python_version())
    for name in ("torch", "triton", "numpy"):
        found = _version(name)
        if found is None:
            if name == "triton" and not sys.platform.startswith("linux"):
                continue
            yield Finding("problem", name, "is not installed", f"pip install {name}")
        else:
            yield _release(name, found)
    for name, use in OPTIONAL.items():
        found = _version(name)
        yield Finding("ok", name, found) if found else Finding("note", name, "is not installed", f"needed for {use}")


def devices() -> Iterator[Finding]:
    import torch

    machine = detect()
    if not machine.cuda_devices:
        yield Finding("note", "GPU", f"none: {machine.cuda_problem}", "training runs on the CPU")
    for number, device in enumerate(machine.cuda_devices):
        capability = ".".join(map(str, device.capability))
        found = (
            f"{device.name}, {device.memory / GIB:.0f} GiB, compute capability {capability}, driver {machine.driver}"
        )
        yield Finding("ok", f"GPU {number}", found)
        if device.capability < (8, 0):
            yield Finding(
                "warning",
                f"GPU {number}",
                f"compute capability {capability} has no bfloat16 products",
                "set training.precision=float32",
            )
    if machine.cuda_devices and torch.version.cuda is None:
        yield Finding(
            "problem",
            "torch",
            f"{torch.__version__} is built without CUDA, and there is a GPU",
            "install a CUDA build of torch: https://pytorch.org/get-started/locally",
        )
    elif machine.cuda_devices and not torch.cuda.is_available():
        yield Finding(
            "problem",
            "CUDA",
            f"torch is built for CUDA {torch.version.cuda} and can't use driver {machine.driver}",
            "update the NVIDIA driver, or install a torch build for an older CUDA",
        )


def processors() -> Iterator[Finding]:
    machine = detect()
    usable, quota = machine.cpu_count, _cpu_quota()
    found = f"{usable} CPU cores" + (f", of which a control group allows {quota:g}" if quota else "")
    if quota and quota < usable:
        threads = max(1, int(quota))
        yield Finding("warning", "cores", found, f"set OMP_NUM_THREADS={threads}, or threads wait for one another")
    else:
        yield Finding("ok", "cores", found)
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 1.5 * usable:
        yield Finding("warning", "load", f"{load:.1f} processes want {usable} cores", "do not trust timings made now")
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    yield Finding("ok", "start method", f"{method} by default; encoding spawns its workers whatever it is")


def environment() -> Iterator[Finding]:
    known = {*registry.registry.VARIABLES, *_declared_variables()}
    for name in sorted(name for name in os.environ if name.startswith("CS336_")):
        if name not in known:
            yield Finding(
                "problem",
                name,
                "is no variable that anything reads, so every choice of a backend is refused",
                f"unset {name}; {suggestion(name, known)}",
            )
    try:
        layers = registry.registry.layers()
    except RegistryError as error:
        yield Finding("problem", "selection", str(error), "correct the selector")
    else:
        yield Finding("ok", "selection", "; ".join(f"{layer.name}: {layer.selection}" for layer in layers))
    if detect().triton_interpreter:
        gpu = bool(detect().cuda_devices)
        yield Finding(
            "warning" if gpu else "note",
            "TRITON_INTERPRET",
            "is 1: Triton kernels run in an interpreter on the CPU, thousands of times slower",
            "unset TRITON_INTERPRET to run them on the GPU" if gpu else "right for tests, not for training",
        )


def plugins() -> Iterator[Finding]:
    try:
        found = registry.backends()
    except RegistryError as error:
        yield Finding("problem", "backends", str(error), "correct what it names")
        return
    working = [name for name, status in found.items() if status.state == "ok"]
    yield Finding("ok", "backends", ", ".join(working))
    advice = {
        "broken": "cs336 backends --traceback shows where; update or uninstall {distribution}",
        "blocked": "remove it from CS336_BLOCK or [tool.cs336] block to use it",
        "unavailable": "nothing, unless you want to use it",
    }
    for name, status in found.items():
        if status.state != "ok":
            origin = status.distribution or "the package that provides it"
            level = "warning" if status.state == "broken" else "note"
            yield Finding(
                level,
                f"backend {name}",
                f"{status.state}: {status.reason}",
                advice[status.state].format(distribution=origin),
            )


def compiler(configuration: Configuration | None, seconds: float) -> Iterator[Finding]:
    """Whether torch.compile works here, and computes what it should."""
    wanted = configuration is not None and configuration.training.compile
    device = (
        "cuda" if detect().cuda_devices and (configuration is None or configuration.training.device != "cpu") else "cpu"
    )
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)
    if found is None:
        yield Finding(
            "problem" if wanted else "note",
            "C++ compiler",
            "none, and torch.compile needs one; the canary was left out",
            "apt-get install g++, or set training.compile=false" if wanted else "apt-get install g++",
        )
        return
    yield Finding("ok", "C++ compiler", found)
    if seconds <= 0:
        yield Finding("note", "torch.compile", "not tried: the canary was left out")
        return
    precision = configuration.training.precision if configuration else "float32"
    backend = configuration.backend if configuration else None
    yield canary(device, precision, backend, seconds, wanted)


def canary(device: str, precision: str, backend: str | None, seconds: float, wanted: bool) -> Finding:
    """One compiled training step in a process of its own, for at most `seconds`."""
    subject, bad = "torch.compile", "problem" if wanted else "warning"
    cure = "set training.compile=false" + ("" if wanted else " (the default)")
    command = [
        sys.executable,
        "-m",
        "cs336_registry.pipeline.canary",
        device,
        precision,
        *([backend] if backend else []),
    ]
    try:
        status, output, errors = _within(command, seconds)
    except subprocess.TimeoutExpired:
        return Finding(
            "warning", subject, f"a tiny model did not compile within {seconds:g} s", f"wait longer, or {cure}"
        )
    if status:
        last = (errors.strip().splitlines() or [f"exit status {status}"])[-1]
        return Finding(bad, subject, f"compiling a tiny model fails on {device}: {last[:300]}", cure)
    result = json.loads(output.strip().splitlines()[-1])
    if result["problem"]:
        found = f"a compiled training step is wrong on {device} in {precision}: {result['problem']}"
        return Finding(bad, subject, found, f"{cure}, and another version of torch if you need it")
    return Finding(
        "ok", subject, f"a compiled training step on {device} in {precision} agrees, {result['seconds']:g} s"
    )


def _within(command: list[str], seconds: float) -> tuple[int, str, str]:
    """The canary's exit status, output and errors; it ends when time is up, on Ctrl-C, and with this process."""
    # One compiling process: a pool of them would outlive the canary when time is up.
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    held_by_canary, held_here = os.pipe()
    with open(held_by_canary, "rb"), open(held_here, "wb"):
        process = subprocess.Popen(
            [*command, "--parent", str(held_by_canary)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            pass_fds=[held_by_canary],
        )
        try:
            output, errors = process.communicate(timeout=seconds)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return process.returncode, output, errors


def space(home: Path) -> Iterator[Finding]:
    """Memory and disk, without a configuration to hold them against."""
    memory = available_memory()
    if memory is not None:
        yield Finding("ok", "memory", f"{memory / GIB:.1f} GiB are free")
    free = shutil.disk_usage(existing(home)).free
    level, advice = ("warning", "make room before a run") if free < GIB else ("ok", "")
    yield Finding(level, "disk", f"{free / GIB:.1f} GiB are free in {existing(home)}", advice)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def available_memory() -> int | None:
    """Bytes that new processes can have: what the system says is free, within the control group's limit."""
    found = []
    meminfo = _read(Path("/proc/meminfo"))
    found += [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable:")]
    limit, used = (_read(Path("/sys/fs/cgroup") / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdecimal() and used.isdecimal():
        found.append(max(0, int(limit) - int(used)))
    return min(found, default=None)


def _cpu_quota() -> float | None:
    quota, _, period = _read(Path("/sys/fs/cgroup/cpu.max")).strip().partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None


def _read(path: Path) -> str:
    """The file's text; empty where this system has no such file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _release(name: str, found: str) -> Finding:
    oldest, newest = TESTED.get(name, (None, None))
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdecimal())
    if oldest and numbers < oldest:
        wanted = ".".join(map(str, oldest))
        return Finding("problem", name, f"{found} is older than {wanted}", f"install {name} {wanted} or newer")
    if newest and numbers > newest:
        wanted = ".".join(map(str, newest))
        return Finding("warning", name, f"{found} is newer than the newest one tried, {wanted}", "run the tests first")
    return Finding("ok", name, found)


def _declared_variables() -> frozenset[str]:
    """What backends read; nothing where discovery itself is refused, which `plugins` reports."""
    try:
        return registry.registry._discover().environment
    except RegistryError:
        return frozenset()
