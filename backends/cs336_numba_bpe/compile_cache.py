"""Compiled kernels, kept on disk as object code, so that a run needs neither numba (1 s to import) nor a compiler.

The first use compiles the numba source in `kernels/` for this CPU and writes one relocatable object per group of
kernels. Later runs load it with llvmlite's linker and call it through ctypes, which releases the interpreter lock. The
file's name holds a digest of the source, of numba's and llvmlite's versions and of the CPU; its content is checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import stat
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .kernel_list import GROUPS, Kernel

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"cs336_numba_bpe object 1\n"
SHARED_SOURCES = ("character_classes.py", "constants.py", "kernel_list.py", "merge_state.py")


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cs336_registry/numba_bpe`, in the home folder's `.cache` where that is not set."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cs336_registry" / "numba_bpe"


def private_folder(folder: Path) -> Path:
    """Make `folder`, for this user alone: machine code from a folder that others may write is never run."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(
            f"{folder} belongs to another user or others may write to it, so compiled code in it can't be trusted: "
            f"chmod 700 it, or name another cache folder"
        )
    return folder


@cache
def source_digest() -> str:
    """Names what the object code depends on: the kernels' source and the compiler's version."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in [*sorted((folder / "kernels").glob("*.py")), *(folder / name for name in SHARED_SOURCES)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for package in ("numba", "llvmlite"):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()


@cache
def _llvm() -> Any:
    """llvmlite's binding, ready to load and to compile for this CPU."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def object_path(group: str, folder: Path) -> Path:
    llvm = _llvm()
    machine = f"{source_digest()} {llvm.get_process_triple()} {llvm.get_host_cpu_name()} {_features()}"
    return folder / f"{group}_{hashlib.sha256(machine.encode()).hexdigest()[:24]}.o"


@cache
def _features() -> str:
    return _llvm().get_host_cpu_features().flatten()


def is_available() -> bool:
    """Whether this machine can compile or run kernels at all: llvmlite and numba are installed."""
    try:
        return bool(version("numba") and version("llvmlite"))
    except PackageNotFoundError:
        return False


def is_warm(groups: tuple[str, ...], folder: Path | None = None) -> bool:
    """Whether all these groups are already loaded or lie compiled on disk."""
    folder = folder or default_cache_folder()
    return all((group, folder) in _loaded or object_path(group, folder).is_file() for group in groups)


_loaded: dict[tuple[str, Path], SimpleNamespace] = {}


def load_kernels(
    group: str, folder: Path | None = None, announce: Callable[[str], None] | None = None
) -> SimpleNamespace:
    """The kernels of a group as Python callables, compiled first where no object code is kept.

    announce: told before a compilation starts; by default a line on stderr when that is a terminal.
    """
    folder = folder or default_cache_folder()
    if (group, folder) not in _loaded:
        path = object_path(group, private_folder(folder))
        content = _read_object(path)
        if content is None:
            content = _compile_and_keep(group, path, announce or _say)
        _loaded[group, folder] = _link(group, content)
    return _loaded[group, folder]


def warmup(folder: Path | None = None, announce: Callable[[str], None] | None = None) -> float:
    """Compile ahead whatever is not compiled yet; returns the seconds it took."""
    from .character_classes import load_character_classes

    started = time.perf_counter()
    for group in GROUPS:
        load_kernels(group, folder, announce)
    load_character_classes(private_folder(folder or default_cache_folder()))
    return time.perf_counter() - started


def _say(message: str) -> None:
    if sys.stderr.isatty():
        print(message, file=sys.stderr, flush=True)


def _read_object(path: Path) -> bytes | None:
    """The object code in `path`, or None where there is none or it is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    header, digest, code = content[: len(MAGIC)], content[len(MAGIC) : len(MAGIC) + 32], content[len(MAGIC) + 32 :]
    return code if header == MAGIC and hashlib.sha256(code).digest() == digest else None


def _compile_and_keep(group: str, path: Path, announce: Callable[[str], None]) -> bytes:
    from filelock import FileLock

    from cs336_registry.text.files import write_bytes

    with FileLock(path.with_suffix(".lock")):
        content = _read_object(path)  # another process may have compiled it while this one waited
        if content is not None:
            return content
        announce(f"numba_bpe: compiling the kernels to {group} for this CPU, once (about 10 s); kept in {path}")
        started = time.perf_counter()
        code = compile_group(group)
        with contextlib.suppress(OSError):  # a full disk only means compiling again next time
            write_bytes(path, MAGIC + hashlib.sha256(code).digest() + code)
        announce(f"numba_bpe: compiled in {time.perf_counter() - started:.1f} s")
        return code


def compile_group(group: str) -> bytes:
    """Compile the kernels of a group into one object file's bytes."""
    from importlib import import_module

    llvm = _llvm()
    modules, symbols = [], {}
    for name, kernel in GROUPS[group].items():
        function = getattr(import_module(f".kernels.{kernel.module}", __package__), name.split(":")[0])
        signature = tuple(_numba_type(argument) for argument in kernel.arguments)
        function.compile(signature)
        compiled = function.overloads[signature]
        symbols[compiled.fndesc.llvm_func_name] = _symbol(name)
        modules.append(llvm.parse_assembly(compiled.library.get_llvm_str()))
    merged = modules[0]
    for module in modules[1:]:
        merged.link_in(module)
    for symbol, name in symbols.items():
        entry = merged.get_function(symbol)
        entry.name = name
    for function in merged.functions:
        if not function.is_declaration and function.name not in symbols.values():
            function.linkage = "internal"
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(), opt=3, reloc="pic", codemodel="default"
    )
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(merged, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    _refuse_outside_symbols(merged, group)
    return machine.emit_object(merged)


def _refuse_outside_symbols(module: Any, group: str) -> None:
    """Object code that needs anything from numba's runtime would end the process when it is linked."""
    allowed = ("llvm.", "memcpy", "memset", "memmove")
    outside = [f.name for f in module.functions if f.is_declaration and not f.name.startswith(allowed)]
    if outside:
        raise RuntimeError(f"kernels of group {group} call {', '.join(outside)}, which only numba's runtime has")


def _symbol(name: str) -> str:
    return "cs336_" + name.replace(":", "_")


def _numba_type(argument: str) -> Any:
    import numba

    name, brackets = argument.partition("[")[0], argument.count("[")
    scalar = getattr(numba.types, name)
    return numba.types.Array(scalar, brackets, "C") if brackets else scalar


def _link(group: str, code: bytes) -> SimpleNamespace:
    llvm = _llvm()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=_features(), opt=3, jit=True
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    namespace = SimpleNamespace(engine=engine)
    for name, kernel in GROUPS[group].items():
        setattr(namespace, _symbol(name)[6:], _callable(name, engine.get_function_address(_symbol(name)), kernel))
    return namespace


def _callable(name: str, address: int, kernel: Kernel) -> Callable[..., int]:
    """A Python function over a compiled one, in numba's calling convention: status = f(&result, &error, arguments...),
    where an array is seven or nine values: owner, parent, items, item size, data, shape, strides."""
    types: list[Any] = [ctypes.c_void_p, ctypes.c_void_p]
    for argument in kernel.arguments:
        dimensions = argument.count("[")
        types += [ctypes.c_int64] if not dimensions else [ctypes.c_void_p] * 2 + [ctypes.c_int64] * (3 + 2 * dimensions)
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *types)(address)
    wanted = [(argument.partition("[")[0], argument.count("[")) for argument in kernel.arguments]

    def call(*arguments: Any) -> int:
        result, error = ctypes.c_int64(0), ctypes.c_void_p(0)
        flat: list[Any] = []
        for value, (dtype, dimensions) in zip(arguments, wanted, strict=True):
            if dimensions:
                flat += _array_arguments(value, dtype, dimensions)
            else:
                flat.append(value)
        if function(ctypes.addressof(result), ctypes.addressof(error), *flat) != 0:
            raise RuntimeError(f"the compiled kernel {name} failed: delete the folder {default_cache_folder()}")
        return result.value

    return call


def _array_arguments(array: np.ndarray, dtype: str, dimensions: int) -> list[Any]:
    if array.dtype.name != dtype or array.ndim != dimensions or not array.flags.c_contiguous:
        raise TypeError(f"expected a contiguous {dimensions}-D {dtype} array, got {array.ndim}-D {array.dtype}")
    return [None, None, array.size, array.itemsize, array.ctypes.data, *array.shape, *array.strides]
