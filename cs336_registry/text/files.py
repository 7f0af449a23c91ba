"""Writing files so that a reader never sees half of one, whatever kills the writer.

The content goes to a temporary file in the same folder, is flushed to the disk, and takes the final name in one step.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

StrPath = str | os.PathLike[str]

ABANDONED_SECONDS = 3600.0
"""A temporary file that nobody has written to for so long is what a killed writer left."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_write(path: StrPath, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """A file that appears under `path`, complete, when the block ends without an error, and not at all otherwise.

    Folders on the way are made. Text is UTF-8 and its newlines are not translated. A symbolic link is written through,
    and so is what is no file, such as /dev/stdout or a pipe. What killed writers of the same file left is removed.
    """
    target = Path(os.path.realpath(path))
    encoding, newline = (None, None) if mode == "wb" else ("utf-8", "")
    if target.exists() and not target.is_file() and not target.is_dir():
        with open(path, mode, encoding=encoding, newline=newline) as file:
            yield file
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    start = f".{target.name[:100]}."
    drop_abandoned(target.parent, re.escape(start) + r"[0-9a-f]{12}\.tmp")
    temporary = target.with_name(f"{start}{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(target)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            told = f"{os.strerror(error.errno)}: what was complete before is kept; free some space and run it again"
            raise OSError(error.errno, told, str(target)) from None
        raise
    sync_folder(target.parent)


def drop_abandoned(folder: StrPath, names: str = r"\..*\.tmp") -> None:
    """Remove the temporary files that killed writers left in `folder`; one that is still being written stays.

    names: a regular expression that their names match as a whole.
    """
    for name in filter(re.compile(names, re.DOTALL).fullmatch, os.listdir(folder)):
        path = Path(folder, name)
        # Another process was faster, or it is another user's.
        with suppress(FileNotFoundError, PermissionError):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def write_bytes(path: StrPath, content: bytes) -> None:
    """Write `content` under `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: StrPath, content: str) -> None:
    """Write `content` as UTF-8 under `path`, whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: StrPath, content: Any, *, indent: int | None = None) -> None:
    """Write `content` as JSON that people can read (UTF-8, not escaped), whole or not at all."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=indent) + "\n")


def sync_folder(folder: StrPath) -> None:
    """Make renames inside `folder` survive a power cut, on systems whose folders can be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
