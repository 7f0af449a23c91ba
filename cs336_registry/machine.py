"""What this machine has, found without importing a framework.

The GPU is asked through the driver's management library, which creates no CUDA context, so worker processes may still
fork.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class CudaDevice:
    """One visible GPU: its name, compute capability (major, minor) and memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Machine:
    """The facts that choosing a backend may depend on."""

    python: str
    system: str
    cpu_count: int
    cuda_devices: tuple[CudaDevice, ...] = ()
    cuda_problem: str = ""
    """Why there is no CUDA device, in a sentence; empty where there is one."""
    driver: str = ""
    triton_interpreter: bool = False
    """TRITON_INTERPRET=1: Triton kernels run on CPU tensors, slowly and exactly."""

    @property
    def device(self) -> str:
        """The device that work runs on here when nobody says otherwise."""
        return "cuda" if self.cuda_devices else "cpu"


def detect() -> Machine:
    """This machine, now: the environment is read at every call, the GPU driver once per process."""
    devices, problem, driver = _cuda(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu_count=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cuda_devices=devices,
        cuda_problem=problem,
        driver=driver,
        triton_interpreter=os.environ.get("TRITON_INTERPRET") == "1",
    )


@cache
def _cuda(visible: str | None) -> tuple[tuple[CudaDevice, ...], str, str]:
    """(visible devices, why there is none, driver version)."""
    import ctypes

    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        return (), "no NVIDIA driver is installed", ""
    if (code := nvml.nvmlInit_v2()) != 0:
        return (), f"the NVIDIA driver does not answer (NVML error {code})", ""
    try:
        version = ctypes.create_string_buffer(96)
        nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(96))
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        wanted = _visible_indices(visible, count.value)
        devices = tuple(_device(nvml, index) for index in wanted)
    finally:
        nvml.nvmlShutdown()
    if devices:
        return devices, "", version.value.decode()
    why = f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU" if count.value else "the NVIDIA driver sees no GPU"
    return (), why, version.value.decode()


def _visible_indices(visible: str | None, count: int) -> list[int]:
    """CUDA_VISIBLE_DEVICES as CUDA reads it: indices up to the first invalid one; UUIDs count as one device each."""
    if visible is None:
        return list(range(count))
    indices: list[int] = []
    for position, entry in enumerate(part.strip() for part in visible.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            indices.append(min(position, count - 1))
        elif entry.isdigit() and int(entry) < count:
            indices.append(int(entry))
        else:
            break
    return indices


def _device(nvml, index: int) -> CudaDevice:
    import ctypes

    class Memory(ctypes.Structure):
        _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))

    handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), Memory()
    nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(96))
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return CudaDevice(name.value.decode(), (major.value, minor.value), int(memory.total))
