"""What every kernel file of this backend shares: number helpers, the launch, and the list of production launches.

How a kernel file `<component>.py` is written
  1. Upcast right after each load (`tl.load(...).to(ACCUMULATOR)`), where `ACCUMULATOR: tl.constexpr` comes from
     `accumulator(x.dtype)`: float32, or float64 for float64 inputs, so that gradcheck speaks about the kernel itself.
  2. Every matrix product goes through `dot`; every store of a float goes through `narrow(value, dtype)`. Triton's
     interpreter stores bfloat16 as raw integers and truncates when it narrows: these two make it right and cost
     nothing on a GPU. Never add, multiply or compare bfloat16 values before upcasting.
  3. Program ids are cast before they are multiplied: `tl.program_id(0).to(tl.int64)`. No block pointers, no libdevice,
     no `@triton.autotune`: sizes come from `configurations.configuration(...)`.
  4. Host code launches through `launch(kernel, grid, *arguments, num_warps=, num_stages=, **constants)`. The first
     argument is a tensor. Grids put the long dimension first (the others end at 65535). An empty grid is no launch.
  5. Inputs are never written. `contiguous_rows(x)` is the policy for row-wise ops: a view where one exists, otherwise a
     copy made knowingly; attention reads any strides.
  6. `production_calls()` yields `(label, call)` pairs, sorted and cheap: `call()` runs the file's host functions (not
     the registered operator, whose fake implementation would answer) on `torch.empty(..., device="meta")` tensors of
     the sizes and dtypes used in earnest, forward and backward. Under `record_launches(...)` they launch nothing and
     leave the exact arguments; the cross-compilation gate and `benchmarks/triton_tuning.py` compile those for each
     card. Host functions must therefore read only shapes, strides and dtypes, which also keeps them free of
     synchronisation and safe under CUDA graphs.

       def production_calls():
           for dtype in PRODUCTION_DTYPES:
               x, weight = meta(8192, 4096, dtype=dtype), meta(4096, dtype=dtype)
               yield f"rmsnorm_{dtype_name(dtype)}", partial(forward_backward, x, weight)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETING = bool(triton.knobs.runtime.interpret)
"""True where TRITON_INTERPRET=1 was set before Triton was imported: kernels then run on the CPU, in NumPy."""

PRODUCTION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_INTERPRETING: tl.constexpr = tl.constexpr(INTERPRETING)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """`value` rounded to nearest even in `dtype`."""
    if _INTERPRETING and dtype == tl.bfloat16:
        value = value.to(tl.float32)
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, rounded, bits | 0x400000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def dot(a, b, accumulator):
    """`accumulator + a @ b`, in the accumulator's precision; float32 is multiplied as IEEE float32, not TF32."""
    if _INTERPRETING:
        a = a.to(accumulator.dtype)
        b = b.to(accumulator.dtype)
    return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=accumulator.dtype)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The type that sums are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """`accumulator` as a torch dtype, for tensors of statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cdiv(dividend: int, divisor: int) -> int:
    """The quotient, rounded up. `triton.cdiv`, which kernels may call too, takes 30 times as long on the host."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor with a shape and no memory, for `production_calls`."""
    return torch.empty(shape, dtype=dtype, device="meta")


def contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as (rows, last dimension) with unit stride along a row and any stride between rows: a view if it can be."""
    if x.ndim == 1:
        x = x.unsqueeze(0)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def rows_of(x: Tensor, n_cols: int) -> tuple[Tensor, int]:
    """(contiguous_rows(x), the stride between rows); what is contiguous stays as it is: the host is spared a view."""
    if x.is_contiguous():
        return x, n_cols
    rows = contiguous_rows(x)
    return rows, rows.stride(0)


@dataclass(frozen=True)
class Card:
    """What a launch needs to know about the device."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    """Bytes of shared memory one program may use."""


INTERPRETER_CARD = Card(capability=(0, 0), multiprocessors=2, shared_memory=1 << 30)


def card(device: torch.device) -> Card:
    """The card behind `device`; the interpreter counts as a card of capability (0, 0) with two multiprocessors."""
    if _recording is not None:
        return _recording.card
    if INTERPRETING:
        return INTERPRETER_CARD
    if device.type != "cuda":
        raise ValueError(
            f"cs336_triton: tensors are on {device}, but Triton's kernels need a CUDA device: move the tensors, or set "
            f"TRITON_INTERPRET=1 before Python starts to run the kernels on the CPU in Triton's interpreter (slow)"
        )
    return _cuda_card(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_card(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    return Card(
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
    )


@dataclass(frozen=True)
class Launch:
    """One recorded launch: enough to compile the kernel as it would be compiled at run time."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@dataclass
class Recording:
    card: Card
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


@contextlib.contextmanager
def record_launches(card: Card) -> Iterator[list[Launch]]:
    """Inside, `launch` runs nothing and remembers everything, and the device is taken to be `card`."""
    global _recording
    previous, _recording = _recording, Recording(card)
    try:
        yield _recording.launches
    finally:
        _recording = previous


def allow_scratch_memory() -> None:
    """Let Triton take the memory of descriptors that a kernel makes from PyTorch; call it before such a launch."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


@contextlib.contextmanager
def language_prepared_once() -> Iterator[None]:
    """Inside, the interpreter does no work of which nothing is left: kernels run in a third of the time.

    It prepares `triton.language` once per module instead of at every call of a device function; preparing it replaces
    some hundred attributes, and the launch undoes it, as always. And it does not compute the overflow check of every
    int32 operation, whose finding it looks at in debug mode alone. A Triton without these is left as it is.
    """
    from triton.runtime import interpreter

    prepare = getattr(interpreter, "_patch_lang", None)
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if prepare is None or not hasattr(options, "sanitize_overflow"):
        yield
        return
    prepared = set()

    def prepare_once(function: Any) -> Any:
        if function.__module__ in prepared:
            return _NothingToUndo
        prepared.add(function.__module__)
        scope = prepare(function)
        # Triton 3.6 asks for the int of an array of one entry, which NumPy 2.4 refuses. The scope undoes this too.
        tl.tensor.__index__ = lambda tensor: int(tensor.handle.data.reshape(()))
        return scope

    interpreter._patch_lang = prepare_once
    builder.options = replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)
    try:
        yield
    finally:
        interpreter._patch_lang = prepare
        builder.options = options


class _NothingToUndo:
    @staticmethod
    def restore() -> None:
        """What the outermost call prepared is undone by it."""


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int, **constants: Any
) -> None:
    """Run `kernel` over `grid` on the device of its first argument. A grid with a zero in it is no launch.

    Fused multiply-add is asked for explicitly, because Triton's default for it differs between versions.
    """
    if 0 in grid:
        return
    keywords = {**constants, "num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, arguments, keywords))
        return
    device = arguments[0].device
    if INTERPRETING:
        with language_prepared_once():
            kernel[grid](*arguments, **keywords)
    elif device.type != "cuda":
        card(device)
    elif device.index == torch.cuda.current_device():
        _run(kernel, grid, arguments, keywords, device.index)
    else:
        with torch.cuda.device(device):
            _run(kernel, grid, arguments, keywords, device.index)


def _run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], keywords: dict[str, Any], device: int) -> None:
    """Launch what was compiled for arguments of this kind; Triton itself takes twice the time to find it."""
    kinds = [a if type(a) is int else float if type(a) is float else _kind(a) for a in arguments]
    key = (id(kernel), device, *keywords.values(), *kinds)
    found = _compiled.get(key)
    if found is not None:
        _, compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **keywords)
    if len(_compiled) >= MOST_COMPILED:
        _compiled.clear()
    _compiled[key] = kernel, compiled, tuple(keywords[name] for name in kernel.arg_names[len(arguments) :])


def _kind(argument: Any) -> Any:
    """What Triton compiles for: the dtype and the alignment of a tensor, the dtype and the tiles of a descriptor.

    Integers, which it compiles for some properties of, are taken as they are; floats are never specialised on. A
    descriptor's layout follows from its dtype and tiles in this backend.
    """
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if hasattr(argument, "block_shape"):
        return argument.base.dtype, *argument.block_shape
    return argument


MOST_COMPILED = 10_000
_compiled: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}
"""What was compiled and its constants, by the kernel's id and the kinds of its arguments; beside the kernel, so that no
other one gets its id."""
