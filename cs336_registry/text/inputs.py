"""Reading text from files of any size: plain, .gz, .zst, .jsonl, .parquet, folders, globs and standard input (`-`).

An input is a sequence of texts that pretokens never cross: a plain file is one text; a line of .jsonl (its "text"
field) and a row of .parquet (its "text" column) are one text each. Each arrives in blocks, so memory stays bounded.
Bytes are decoded as UTF-8 with malformed ones replaced by U+FFFD, and newlines are never translated.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import sys
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .files import StrPath

InputPath = StrPath | Sequence[StrPath]
Watch = Callable[[Path, bytes], None]
"""Is shown the bytes of each file as they are read, unpacked."""

BLOCK_SIZE = 1 << 20
STANDARD_INPUT = Path("-")
REPLACEMENT = "\ufffd".encode()
_PACKINGS = (".gz", ".zst")
_JSON_LINES = (".jsonl", ".ndjson")
_FRAME_STEP = 1 << 10
"""Bytes of a .zst file that are unpacked at once: a few of them may hold megabytes of text."""


def expand(input_path: InputPath) -> list[Path]:
    """The files that `input_path` names, in a fixed order.

    A folder gives every file below it whose name has no leading dot, sorted; a string with `*`, `?` or `[` that is no
    file's name is a glob (`**` for any depth). Links are followed; a folder that several lead to is read once. Raises
    FileNotFoundError for a name or a link without a file behind it.
    """
    if isinstance(input_path, str | os.PathLike):
        return _expand_one(input_path)
    if not isinstance(input_path, Iterable):
        raise TypeError(f"input_path is {input_path!r}: pass a path, or a list of paths")
    paths = [path for one in input_path for path in _expand_one(one)]
    if not paths:
        raise ValueError("input_path is empty: pass a path, or a list with at least one path")
    return paths


def kind(path: Path) -> str:
    """How a file is read, by the end of its name: "jsonl", "gz", "jsonl.gz", "parquet" ..., or "" where it is plain."""
    if path.suffix == ".parquet":
        return "parquet"
    packing = path.suffix if path.suffix in _PACKINGS else ""
    inner = Path(path.stem).suffix if packing else path.suffix
    return (f".jsonl{packing}" if inner in _JSON_LINES else packing).removeprefix(".")


def is_plain(path: Path) -> bool:
    """Whether `path` is a file whose own bytes are its text, so that it can be read from any offset, and again.

    A pipe is none, and neither is what is packed.
    """
    return path != STANDARD_INPUT and not kind(path) and path.is_file()


def refuse_inputs(out: Path, inputs: Iterable[Path], beside: Iterable[Path] = ()) -> None:
    """Raise ValueError where `out`, or what is written beside it, is one of the inputs."""
    taken = {path.resolve() for path in inputs}
    for written in (out, *beside):
        if written.resolve() in taken:
            raise ValueError(f"{written} is one of the inputs, and --out {out} writes to it: choose another --out")


def byte_texts(
    input_path: InputPath, block_size: int = BLOCK_SIZE, watch: Watch | None = None
) -> Iterator[Iterator[bytes]]:
    """Every text as an iterator of byte blocks; each must be consumed before the next is asked for.

    Blocks may cut a character; bytes are as they are in the file, malformed UTF-8 included.
    """
    for path in expand(input_path):
        if kind(path) == "parquet":
            yield from _parquet_texts(path, watch)
        elif kind(path).startswith("jsonl"):
            yield from _jsonl_texts(path, watch)
        else:
            yield _blocks(path, block_size, watch)


def texts(input_path: InputPath, block_size: int = BLOCK_SIZE) -> Iterator[Iterator[str]]:
    """Every text as an iterator of strings; each must be consumed before the next is asked for."""
    return map(decoded, byte_texts(input_path, block_size))


def decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    """The blocks as text: the same as decoding them joined, with errors="replace"."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for block in blocks:
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


class MalformedCounter:
    """Counts the sequences of bytes that are not UTF-8, each of which `decoded` replaces by one U+FFFD.

    is_whole: whether the file is read to its end; elsewhere a character that is cut is none of them.
    """

    def __init__(self, is_whole: bool = True) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._replaced, self._last, self._is_whole = 0, b"", is_whole

    def __call__(self, block: bytes) -> None:
        """The file goes on with `block`."""
        if found := self._decoder.decode(block).count("\ufffd"):
            # Not those that the file itself has.
            self._replaced += found - (self._last + block).count(REPLACEMENT)
        self._last = (self._last + block[-2:])[-2:]

    @property
    def total(self) -> int:
        """How many there are, where the file ends here: what was begun is one more."""
        return self._replaced + (self._is_whole and bool(self._decoder.getstate()[0]))


def malformed_in(paths: Iterable[Path]) -> dict[Path, MalformedCounter]:
    """What each file has of them, by reading it all."""
    counters: defaultdict[Path, MalformedCounter] = defaultdict(MalformedCounter)
    for path in paths:
        for blocks in byte_texts(path, watch=lambda path, block: counters[path](block)):
            deque(blocks, maxlen=0)
    return counters


def malformed_warnings(counters: Mapping[Path, MalformedCounter]) -> Iterator[str]:
    """A line for each file that is not UTF-8 everywhere."""
    for path, counter in counters.items():
        if counter.total:
            name = "standard input" if path == STANDARD_INPUT else path
            yield (
                f"warning: {name} is not UTF-8 everywhere: {counter.total:,} malformed sequences of bytes were "
                f"replaced by U+FFFD; if it has another encoding, convert it first, as iconv does"
            )


def utf8(text: str) -> bytes:
    """`text` as UTF-8; surrogate pairs become their character and lone surrogates U+FFFD, as tiktoken has it."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def _expand_one(name: StrPath) -> list[Path]:
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"input_path holds {name!r}: a path is a string or a pathlib.Path")
    path = _followed(Path(name))
    if path == STANDARD_INPUT or path.is_file() or path.is_fifo():
        return [path]
    if path.is_dir():
        found = sorted(file for file in _below(path) if file.is_file())
        if not found:
            raise FileNotFoundError(f"the folder {path} has no files: pass a file or a folder with text files in it")
        return found
    if any(character in str(name) for character in "*?["):
        found = map(_followed, map(Path, glob.glob(str(name), recursive=True)))
        matches = sorted(match for match in found if match.is_file())
        if not matches:
            raise FileNotFoundError(f"no file matches {str(name)!r}: check the pattern and the folder {Path.cwd()}")
        return matches
    raise FileNotFoundError(f"there is no file {str(name)!r}: pass the path of a text file")


def _below(folder: Path) -> Iterator[Path]:
    """What is below a folder and not hidden, through links, too.

    Path.rglob passes over linked folders and those that it may not read, and the text would be missing.
    """

    def refuse(error: OSError) -> None:
        raise OSError(f"the folder {error.filename} can't be read ({error.strerror}): allow it, or name files instead")

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            # Links may lead in a circle.
            folders.clear()
            continue
        seen.add(real)
        # Sorted, so that of several links to a folder it is always the same one that is followed.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (_followed(Path(parent, name)) for name in names if not name.startswith("."))


def _followed(path: Path) -> Path:
    """The same path, unless it is a link to nothing."""
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which is not there: mend it or remove it")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's uncompressed bytes; damage is reported with the file's name."""
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    damaged: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    with open(path, "rb") as raw:
        stream: Any = raw
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            zstandard = _needs("zstandard", path)
            stream = _Frames(raw, zstandard.ZstdDecompressor())
            damaged = (*damaged, zstandard.ZstdError)
        try:
            yield stream
        except damaged as error:
            raise ValueError(f"{path} is damaged ({error}): fetch or compress it again") from None


class _Frames:
    """The text of zstandard frames one after another, as a stream.

    zstandard's own stream reader ends without an error where a frame is cut short; a frame by itself knows its end.
    """

    def __init__(self, packed: IO[bytes], decompressor: Any) -> None:
        self._texts = self._unpacked(packed, decompressor)
        self._held = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._held) < size and (text := next(self._texts, b"")):
            self._held += text
        block = bytes(self._held[:size])
        del self._held[:size]
        return block

    @staticmethod
    def _unpacked(packed: IO[bytes], decompressor: Any) -> Iterator[bytes]:
        frame = None
        while step := packed.read(_FRAME_STEP):
            while step:
                if frame is None or frame.eof:
                    frame = decompressor.decompressobj()
                if text := frame.decompress(step):
                    yield text
                step = frame.unused_data
        if frame is not None and not frame.eof:
            raise EOFError("it ends in the middle of a frame")


def _blocks(path: Path, block_size: int, watch: Watch | None) -> Iterator[bytes]:
    with _opened(path) as stream:
        while block := stream.read(block_size):
            if watch is not None:
                watch(path, block)
            yield block


def _jsonl_texts(path: Path, watch: Watch | None) -> Iterator[Iterator[bytes]]:
    for number, line in enumerate(_lines(path, watch), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8", "replace"))["text"]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: expected a JSON object with a string "text": {line[:60]!r}')
        yield iter((utf8(text),))


def _lines(path: Path, watch: Watch | None) -> Iterator[bytes]:
    tail = b""
    for block in _blocks(path, BLOCK_SIZE, watch):
        first, *rest = block.split(b"\n")
        if not rest:
            tail += first
            continue
        yield tail + first
        yield from rest[:-1]
        tail = rest[-1]
    yield tail


def _parquet_texts(path: Path, watch: Watch | None) -> Iterator[Iterator[bytes]]:
    _needs("pyarrow", path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise ValueError(
                    f'{path} has no column "text": it has {", ".join(file.schema_arrow.names)}; rename the one to read'
                )
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for value in batch.column(0):
                    if (text := value.as_py()) is None:
                        continue
                    if not isinstance(text, str | bytes):
                        raise ValueError(
                            f'{path}: the column "text" has the type {value.type}: expected strings, or bytes of UTF-8'
                        )
                    content = text if isinstance(text, bytes) else utf8(text)
                    if watch is not None:
                        # The line's end keeps malformed bytes at a text's end from joining with the next text.
                        watch(path, content + b"\n")
                    yield iter((content,))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}): fetch or write it again") from None


def _needs(package: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise ModuleNotFoundError(
            f"reading {path} needs the package {package}: pip install 'cs336-registry[files]'", name=package
        ) from None
