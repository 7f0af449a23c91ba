"""Compiled kernels, kept on disk as machine code, so that a run needs neither numba (1 s to import) nor a compiler.

The first use compiles the numba source in `kernels/` for this CPU and writes one file per group of kernels: an image
that is only mapped into memory (`native_image.py`), or object code that llvmlite links where no image can be made. The
file's name holds a digest of the source, of numba's and llvmlite's versions and of the CPU; its content is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import stat
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

from .calling import CompiledFunction
from .kernel_list import GROUPS, symbol_of
from .native_image import Image, flatten, map_image

MAGIC = b"cs336_numba_bpe machine code 3\n"
SHARED_SOURCES = (
    "character_classes.py",
    "compiler.py",
    "constants.py",
    "kernel_list.py",
    "merge_state.py",
    "native_image.py",
)
_PROCESSOR_FIELDS = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")


def default_cache_folder() -> Path:
    """`$XDG_CACHE_HOME/cs336_registry/numba_bpe`, in the home folder's `.cache` where that is not set; a folder of this
    user among the temporary files where that can't be made, as in a container whose home is read-only."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return _made_or_temporary(Path(root) / "cs336_registry" / "numba_bpe")


@cache
def _made_or_temporary(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        import tempfile

        # Right there: a folder between could be somebody else's, who could exchange what it holds.
        return Path(tempfile.gettempdir()) / f"cs336_registry_{folder.name}_{os.geteuid()}"
    return folder


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
    """Names what the machine code depends on: the kernels' source and the compiler's version."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in [*sorted((folder / "kernels").glob("*.py")), *(folder / name for name in SHARED_SOURCES)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for package in ("numba", "llvmlite"):
        digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()


@cache
def processor() -> str:
    """What tells this processor's instructions from another's, read where that is cheap, else asked from llvmlite."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        with open(path, "rb") as file:  # the first processor's lines: all of them take long on large machines
            lines = file.read(1 << 13).decode("utf-8", "replace").partition("\n\n")[0].splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        found = {name.strip(): value.strip() for name, value in fields.items() if name.strip() in _PROCESSOR_FIELDS}
        if found:
            return json.dumps([sys.platform, platform.machine(), found], sort_keys=True)
    import llvmlite.binding as llvm

    return f"{llvm.get_process_triple()} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"


def code_path(group: str, folder: Path) -> Path:
    name = hashlib.sha256(f"{source_digest()} {processor()}".encode()).hexdigest()[:24]
    return folder / f"{group}_{name}.bin"


def is_available() -> bool:
    """Whether this machine can compile or run kernels at all: llvmlite and numba are installed."""
    try:
        return bool(version("numba") and version("llvmlite"))
    except PackageNotFoundError:
        return False


def is_warm(groups: tuple[str, ...], folder: Path | None = None) -> bool:
    """Whether all these groups are already loaded or lie compiled on disk."""
    folder = folder or default_cache_folder()
    return all((group, folder) in _loaded or code_path(group, folder).is_file() for group in groups)


_loaded: dict[tuple[str, Path], SimpleNamespace] = {}


def load_kernels(
    group: str, folder: Path | None = None, announce: Callable[[str], None] | None = None
) -> SimpleNamespace:
    """The kernels of a group as Python callables, compiled first where no machine code is kept.

    announce: told before a compilation starts; by default a line on stderr when that is a terminal.
    """
    folder = folder or default_cache_folder()
    if (group, folder) not in _loaded:
        path = code_path(group, private_folder(folder))
        content = _read(path)
        if content is None:
            content = _compile_and_keep(group, path, announce or _say)
        addresses = _addresses(group, content)
        _loaded[group, folder] = SimpleNamespace(
            **{
                name.replace(":", "_"): CompiledFunction(name, addresses[symbol_of(name)], kernel)
                for name, kernel in GROUPS[group].items()
            }
        )
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


def _read(path: Path) -> bytes | None:
    """What `path` holds behind its checksum, or None where there is nothing or it is damaged."""
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
        content = _read(path)  # another process may have compiled it while this one waited
        if content is not None:
            return content
        announce(f"numba_bpe: compiling the kernels to {group} for this CPU, once (about 10 s); kept in {path}")
        started = time.perf_counter()
        from .compiler import compile_group

        code = compile_group(group)
        image = flatten(code, _symbols(group))
        entries = None if image is None else image.entries
        content = json.dumps(entries).encode() + b"\n" + (code if image is None else image.code)
        with contextlib.suppress(OSError):  # a full disk only means compiling again next time
            write_bytes(path, MAGIC + hashlib.sha256(content).digest() + content)
        announce(f"numba_bpe: compiled in {time.perf_counter() - started:.1f} s")
        return content


def _symbols(group: str) -> list[str]:
    return [symbol_of(name) for name in GROUPS[group]]


def _addresses(group: str, content: bytes) -> dict[str, int]:
    """Where each kernel begins: of an image, whose entries stand in front of it, or of object code behind a null."""
    header, _, code = content.partition(b"\n")
    entries = json.loads(header)
    if entries is not None:
        addresses = map_image(Image(code, entries))
        if addresses is None:
            raise OSError(
                "this system gives no executable memory, which compiled kernels need: use the backend heap_bpe"
            )
        return addresses
    from .compiler import link

    return link(code, _symbols(group))
