"""Compile this backend's kernels for a card that is not here, and read what the compiler made of them.

`production_calls` collects what the op files declare (see `runtime`), `launches_of` the launches one of them makes, and
`compile_launch` takes a launch through Triton's own path (specialisation, options, cache) up to the cubin, with
a driver that only knows the target. `Artifact` says what a GPU would be asked for: shared memory, registers, local
memory (spills), tensor cores.
Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import importlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .runtime import INTERPRETING, Card, Launch, record_launches

CARDS = {
    80: Card(capability=(8, 0), multiprocessors=108, shared_memory=166_912),
    90: Card(capability=(9, 0), multiprocessors=132, shared_memory=232_448),
    100: Card(capability=(10, 0), multiprocessors=148, shared_memory=232_448),
}
"""A100, H100/H200 and B200: the multiprocessors and the shared memory that one program may use."""


@dataclass(frozen=True)
class Artifact:
    """One compiled kernel."""

    shared_memory: int
    registers: int
    local_memory: int
    """Bytes of stack per thread: registers that the compiler spilled, and arrays it could not keep in registers."""
    ptx: str

    @property
    def tensor_cores(self) -> str:
        """ "wgmma", "tcgen05", "mma" or "" (none)."""
        for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync"):
            if name in self.ptx:
                return name.split(".")[0]
        return ""


def kernel_modules() -> Iterator[Any]:
    """Every module of this backend that declares production calls, by name."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in ("__init__", Path(__file__).stem):
            module = importlib.import_module(f"{__package__}.{path.stem}")
            if hasattr(module, "production_calls"):
                yield module


def production_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    for module in kernel_modules():
        for label, call in module.production_calls():
            yield f"{module.__name__.rpartition('.')[2]}:{label}", call


def launches_of(call: Callable[[], object], card: Card) -> list[Launch]:
    with record_launches(card) as launches:
        call()
    return launches


def compile_launch(launch: Launch, card: Card) -> Artifact:
    """The cubin that `launch` would run on `card`, read back."""
    if INTERPRETING:
        raise RuntimeError("TRITON_INTERPRET is set: kernels can only be compiled in a process without it")
    with _only_a_target(card):
        compiled = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.keywords)
    registers, local_memory = read_cubin(compiled.asm["cubin"], compiled.metadata.name)
    return Artifact(compiled.metadata.shared, registers, local_memory, compiled.asm["ptx"])


@contextlib.contextmanager
def _only_a_target(card: Card) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    major, minor = card.capability

    class TargetOnly:
        """What compiling asks of a driver; device numbers tell Triton's in-process caches apart."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", major * 10 + minor, 32)

        def get_current_device(self) -> int:
            return major * 10 + minor

        def get_current_stream(self, device: int) -> int:
            return 0

    # Not `reset_active`, which looks for a card and raises where there is none.
    previous = getattr(driver, "_active", None)
    driver.set_active(TargetOnly())
    try:
        yield
    finally:
        driver.set_active(previous)


def read_cubin(cubin: bytes, kernel: str) -> tuple[int, int]:
    """(registers per thread, bytes of local memory per thread) from the cubin, a 64-bit ELF file.

    They are attributes in its sections `.nv.info` and `.nv.info.<kernel>`: 0x2f is the register count, 0x11 the frame
    size and 0x12 the smallest stack.
    """
    section_offset, entry_size, count, names_index = (
        *struct.unpack_from("<Q", cubin, 40),
        *struct.unpack_from("<HHH", cubin, 58),
    )
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, section_offset + i * entry_size) for i in range(count)]
    names = headers[names_index]
    registers = local_memory = -1
    for name, _, _, _, offset, size, *_ in headers:
        start = names[4] + name
        section = cubin[start : cubin.index(b"\0", start)].decode()
        if section not in (".nv.info", f".nv.info.{kernel}"):
            continue
        position, end = offset, offset + size
        while position < end:
            layout, attribute, value = struct.unpack_from("<BBH", cubin, position)
            payload = cubin[position + 4 : position + 4 + value] if layout == 4 else b""
            position += 4 + len(payload)
            if attribute == 0x2F:
                registers = max(registers, struct.unpack_from("<I", payload, 4)[0])
            elif attribute in (0x11, 0x12):
                local_memory = max(local_memory, struct.unpack_from("<I", payload, 4)[0])
    if registers < 0 or local_memory < 0:
        raise ValueError(f"the cubin of {kernel} doesn't say how many registers or how much local memory it uses")
    return registers, local_memory
