"""Token ids on disk: a .npy file of uint16 or uint32 that is memory-mapped, and a .json beside it.

The text is encoded in parts that end behind an end-of-text token, so parts can be encoded apart, by several processes,
and an interrupted encoding continues with the missing ones. Memory stays bounded; a reader never sees half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FallbackWarning
from ..text.files import atomic_write, write_json
from ..text.inputs import decoded
from . import tokenization
from .corpus import Split
from .errors import MismatchError, RunError
from .progress import Progress
from .tokenization import RunTokenizer

FORMAT = "cs336 tokens 1"
PART_BYTES = 16 << 20
"""Text per part; a part is what an interruption can cost."""
LARGEST_PART = 4
"""In PART_BYTES: documents that make a longer part are cut inside."""
CHUNK_TOKENS = 1 << 19


@dataclass(frozen=True)
class Tokens:
    """Memory-mapped ids and what is known of them. `bytes` counts their text without special tokens, text_sha256 is of
    all of it."""

    ids: np.ndarray
    path: Path
    documents: int
    bytes: int
    text_sha256: str

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / len(self.ids)


def prepare(
    split: Split,
    tokenizer: RunTokenizer,
    path: Path,
    progress: Progress,
    *,
    workers: int = 1,
    backend: str | None = None,
) -> Tokens:
    """The ids of `split` in `path` (.npy), encoded unless they are there already.

    Raises MismatchError where `path` holds ids of another text or tokenizer, or the text changes while it is encoded.
    """
    parts_folder = path.with_name(f".{path.stem}.parts-{tokenizer.fingerprint}-{split.sha256[:16]}")
    if not path.with_suffix(".json").is_file():
        _encode(split, tokenizer, path, parts_folder, progress, workers, backend)
    if parts_folder.is_dir():  # also one that a run left which was killed when the ids were complete
        shutil.rmtree(parts_folder)
    found = read(path, tokenizer.fingerprint)
    if found.text_sha256 != split.sha256:
        raise MismatchError(
            f"{path} holds the tokens of another text than {split}: choose another folder, or delete {path} and "
            f"{path.with_suffix('.json').name}"
        )
    return found


def read(path: Path, tokenizer_fingerprint: str | None = None) -> Tokens:
    """The ids in `path`, memory-mapped. Refuses a truncated file and ids of another tokenizer."""
    record = _record(path)
    if tokenizer_fingerprint is not None and record["tokenizer"] != tokenizer_fingerprint:
        raise MismatchError(
            f"{path} was encoded with tokenizer {record['tokenizer']}, this run's is {tokenizer_fingerprint}: use the "
            f"tokenizer it was encoded with, or delete the file to encode it again"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} (its .json is there): delete that, too, to encode it again")
    size, expected = path.stat().st_size, record["file_bytes"]
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise MismatchError(
            f"{path} has {size:,} bytes, {expected:,} were written: it is {state}; delete it and its .json to encode "
            f"it again"
        )
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
    return Tokens(ids, path, record["documents"], record["bytes"], record["text_sha256"])


def _encode(
    split: Split,
    tokenizer: RunTokenizer,
    path: Path,
    parts_folder: Path,
    progress: Progress,
    workers: int,
    backend: str | None,
) -> None:
    dtype = np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<u4")
    parts_folder.mkdir(parents=True, exist_ok=True)
    ranges = _cuts(split.path, tokenizer)
    parts = [parts_folder / f"{start}-{end}.part" for start, end in ranges]
    todo = [
        (str(split.path), *one, str(part), dtype.str)
        for one, part in zip(ranges, parts, strict=True)
        if not part.is_file()
    ]
    name = os.path.basename(str(split))
    with progress.stage(f"encoding {name}", split.path.stat().st_size, "B") as stage:
        stage.advance(sum(end - start for (start, end), part in zip(ranges, parts, strict=True) if part.is_file()))
        # Workers read the tokenizer's folder again, which takes its metadata.
        if workers > 1 and len(todo) > 1 and (tokenizer.folder / "metadata.json").is_file():
            try:
                # Spawned, not forked: a thread pool of the parent (torch, numba) must not be copied half-way.
                context = get_context("spawn")
                held_by_worker, held_here = context.Pipe(duplex=False)
                with (
                    held_here,
                    held_by_worker,
                    ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (held_by_worker,)) as pool,
                ):
                    encode = partial(_encode_in_worker, str(tokenizer.folder), backend)
                    try:
                        for done in as_completed([pool.submit(encode, *one) for one in todo]):
                            stage.advance(done.result())
                    except BaseException:
                        # Otherwise every part would be encoded before the error is told.
                        held_here.close()
                        pool.shutdown(cancel_futures=True)
                        raise
            except BrokenProcessPool:
                raise RunError(
                    f"a process that encoded {name} was killed (out of memory?): the parts that were complete are "
                    f"kept; run the same command again, with fewer workers if it was memory"
                ) from None
        else:
            for one in todo:
                _encode_part(tokenizer.tokenizer, *one, stage=stage)
    with open(split.path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != split.sha256:
            shutil.rmtree(parts_folder)
            raise MismatchError(f"{split} changed after it was measured: run this again when it is complete")
    _join(parts, path, dtype, split, tokenizer)


def _join(parts: list[Path], path: Path, dtype: np.dtype, split: Split, tokenizer: RunTokenizer) -> None:
    count = sum(part.stat().st_size for part in parts) // dtype.itemsize
    if count == 0:
        raise RunError(f"{split} encodes to no tokens: it has no text")
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, file, 1 << 22)
    # The record comes last: where it is, the ids are complete.
    write_json(
        path.with_suffix(".json"),
        {
            "format": FORMAT,
            "dtype": dtype.name,
            "tokens": count,
            "file_bytes": path.stat().st_size,
            "documents": split.documents,
            "bytes": split.bytes,
            "end_of_text_id": tokenizer.end_of_text_id,
            "tokenizer": tokenizer.fingerprint,
            "text_sha256": split.sha256,
        },
        indent=2,
    )


def _cuts(path: Path, tokenizer: RunTokenizer) -> list[tuple[int, int]]:
    """Byte ranges that can be encoded apart: behind end-of-text tokens, or, where these are far apart or may be part of
    another special token, wherever a cut is safe."""
    end_of_text, special_tokens = tokenizer.end_of_text, tokenizer.metadata["special_tokens"]
    if end_of_text and not any(_may_cover(other, end_of_text) for other in special_tokens):
        ranges = list(_ranges(path, end_of_text.encode()))
        if all(end - start <= LARGEST_PART * PART_BYTES for start, end in ranges):
            return ranges
    from ..text.byte_ranges import byte_ranges

    return byte_ranges(path, tokenizer.tokenizer.pattern, special_tokens, PART_BYTES)


def _may_cover(other: str, token: str) -> bool:
    """Whether `other` may match where `token` stands, and go before it: it holds it, or ends as it begins."""
    begins_inside = any(other.endswith(token[:size]) for size in range(1, min(len(token), len(other) + 1)))
    return begins_inside or (token in other and other != token)


def _ranges(path: Path, end_of_text: bytes) -> Iterator[tuple[int, int]]:
    """Byte ranges of about PART_BYTES that end behind an end-of-text token (or the file's end)."""
    size, start = path.stat().st_size, 0
    with open(path, "rb") as file:
        while start < size:
            end = start + PART_BYTES
            tail = b""
            file.seek(end)
            while end < size:
                block = file.read(1 << 20)
                position = (tail + block).find(end_of_text)
                if not block or position >= 0:
                    end = size if not block else end - len(tail) + position + len(end_of_text)
                    break
                end, tail = end + len(block), block[-(len(end_of_text) - 1) :]
            end = min(end, size)
            yield start, end
            start = end


def _encode_part(tokenizer: Any, source: str, start: int, end: int, part: str, dtype: str, stage: Any = None) -> int:
    def text() -> Iterator[bytes]:
        with open(source, "rb") as file:
            file.seek(start)
            left = end - start
            while left and (block := file.read(min(left, 1 << 18))):
                left -= len(block)
                yield block
                if stage is not None:
                    stage.advance(len(block))

    def chunks() -> Iterator[np.ndarray]:
        if hasattr(tokenizer, "encode_range"):  # a backend that makes arrays need not make a Python number of each id
            yield tokenizer.encode_range(source, start, end)
            if stage is not None:
                stage.advance(end - start)
            return
        ids = tokenizer.encode_iterable(decoded(text()))
        while len(chunk := np.fromiter(islice(ids, CHUNK_TOKENS), dtype=np.int64)):
            yield chunk

    with atomic_write(part) as file:
        for chunk in chunks():
            file.write(chunk.astype(dtype, copy=False).tobytes())
    return end - start


def _start_worker(parent: Connection) -> None:
    # Ctrl-C reaches the whole group of processes; it is the parent's to end the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The parent has told it.
    warnings.simplefilter("ignore", FallbackWarning)


def _end_with(parent: Connection) -> None:
    """A pool's workers wait for work for ever; when the parent closes its end of a pipe, or is killed, they end."""
    wait([parent])
    os._exit(1)


def _encode_in_worker(folder: str, backend: str | None, *part: Any) -> int:
    return _encode_part(_built(folder, backend), *part)


@lru_cache(maxsize=1)
def _built(folder: str, backend: str | None) -> Any:
    """Built at the first call, not as the worker starts: there an error would break the pool without being told."""
    return tokenization.read(Path(folder), backend).tokenizer


def _record(path: Path) -> dict[str, Any]:
    record_path = path.with_suffix(".json")
    if not record_path.is_file():
        raise FileNotFoundError(f"there is no {record_path}: {path.name} can't be trusted without it; encode it again")
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        # It may be anything, the text itself for one: nobody is told to delete it.
        raise MismatchError(f"{record_path} is not a record of tokens (format {FORMAT!r}): choose another --out")
    return record
