"""The text of a run: documents, split into training and validation text by document.

Both are written as plain UTF-8 with the end-of-text token after every document. The default corpus is what every
Python installation has: the sources of its own standard library (PSF licence), so nothing is fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..text.files import atomic_write, write_json
from ..text.inputs import MalformedCounter, byte_texts, decoded, expand, is_plain, malformed_warnings
from .configuration import STANDARD_LIBRARY, DataConfiguration
from .errors import MismatchError
from .progress import Progress

LEFT_OUT = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
)
"""Folders of the standard library that are not written as prose or programs: tables, test data, installed packages."""
READ_BYTES = 1 << 22
Malformed = tuple[defaultdict[Path, MalformedCounter], defaultdict[Path, MalformedCounter]]
"""What the files of the training and of the validation text have; one may be both."""


@dataclass(frozen=True)
class Split:
    """One side of the corpus. `bytes` counts the text without the end-of-text tokens; `name` is what messages call it
    where `path` is a copy."""

    path: Path
    documents: int
    bytes: int
    sha256: str
    name: str = ""

    def __str__(self) -> str:
        return self.name or str(self.path)

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "documents": self.documents, "bytes": self.bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class Corpus:
    """The two sides and where they came from."""

    source: str
    train: Split
    validation: Split

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "train": self.train.to_dict(), "validation": self.validation.to_dict()}


def prepare(data: DataConfiguration, end_of_text: str, folder: Path, progress: Progress) -> Corpus:
    """The corpus of `data` under `folder` (train.txt, validation.txt, corpus.json), written unless it is there already.

    Raises FileNotFoundError for a missing input, ValueError where the text is empty or has too little to hold out.
    """
    request = _request(data, end_of_text)
    record = folder / "corpus.json"
    if record.is_file():
        content = json.loads(record.read_text(encoding="utf-8"))
        if content.get("request") != request:
            raise MismatchError(
                f"{folder} holds another corpus ({content.get('source')}): choose another folder, or delete {record}"
            )
        corpus = _from_record(content, folder)
        if all(
            side.path.is_file() and side.path.stat().st_size >= side.bytes for side in (corpus.train, corpus.validation)
        ):
            return corpus
    source = _describe(data)
    corpus = _as_it_is(data, end_of_text, source, progress) or _copy(data, end_of_text, folder, source, progress)
    write_json(record, {"request": request} | corpus.to_dict(), indent=2)
    return corpus


def _as_it_is(data: DataConfiguration, end_of_text: str, source: str, progress: Progress) -> Corpus | None:
    """Two plain files that are named need no copy; None where there is something to split, cut or decompress."""
    if data.validation is None or data.maximum_bytes or STANDARD_LIBRARY in (data.train, data.validation):
        return None
    train, validation = expand(data.train), expand(data.validation)
    if len(train) != 1 or len(validation) != 1 or not (is_plain(train[0]) and is_plain(validation[0])):
        return None
    return Corpus(source, *(measure(path, end_of_text, progress) for path in (train[0], validation[0])))


def measure(path: Path, end_of_text: str, progress: Progress, name: str = "") -> Split:
    """What is in a plain file: documents end at `end_of_text`, or, the last one, at the file's end.

    name: what messages call it, instead of `path`. Raises ValueError for an empty file.
    """
    shown = name or str(path)
    mark, digest = end_of_text.encode(), hashlib.sha256()
    total, ends, text_follows, tail = 0, 0, False, b""
    with (
        open(path, "rb") as file,
        progress.stage(f"reading {os.path.basename(shown)}", path.stat().st_size, "B") as stage,
    ):
        while block := file.read(READ_BYTES):
            total += len(block)
            digest.update(block)
            *ended, rest = (tail + block).split(mark) if mark else [block]
            ends += len(ended)
            text_follows = bool(rest.strip()) or (text_follows and not ended)
            # What may be the beginning of a mark that the next block completes.
            tail = rest[len(rest) - min(len(rest), len(mark) - 1) :] if mark else b""
            stage.advance(len(block))
    if total == 0:
        raise ValueError(f"{shown} is empty: pass a file with text in it")
    return Split(path.absolute(), max(1, ends + text_follows), total - ends * len(mark), digest.hexdigest(), name)


def _copy(data: DataConfiguration, end_of_text: str, folder: Path, source: str, progress: Progress) -> Corpus:
    is_whole = data.maximum_bytes is None
    malformed: Malformed = defaultdict(lambda: MalformedCounter(is_whole)), defaultdict(MalformedCounter)
    with (
        progress.stage("reading the corpus", unit="B") as stage,
        _Writer(folder / "train.txt", end_of_text) as train,
        _Writer(folder / "validation.txt", end_of_text) as held,
    ):
        for document, is_validation in _documents(data, end_of_text, malformed):
            (held if is_validation else train).write(document)
            stage.advance(len(document))
        for name, side in (("training", train), ("validation", held)):
            if side.documents == 0:
                raise ValueError(
                    f"{source} leaves no {name} document: it has too little text; pass more, or name files for both "
                    f"data.train and data.validation"
                )
    for line in malformed_warnings(malformed[0] | malformed[1]):
        progress.say(line)
    return Corpus(source, train.split(), held.split())


def standard_library_files() -> list[Path]:
    """The .py files of the running interpreter's standard library, in a fixed order, without LEFT_OUT."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - LEFT_OUT)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if sum(path.stat().st_size for path in found) < 1_000_000:
        raise FileNotFoundError(
            f"the standard library's sources are not at {root} (this Python may come without them): pass your own "
            f"text with --corpus PATH"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _documents(data: DataConfiguration, end_of_text: str, malformed: Malformed) -> Iterator[tuple[str, bool]]:
    """(document, whether it is for validation)."""
    train = _limited(_read(data.train, end_of_text, malformed[0]), data.maximum_bytes)
    if data.validation is not None:
        yield from ((document, False) for document in train)
        yield from ((document, True) for document in _read(data.validation, end_of_text, malformed[1]))
        return
    last = next(train, None)
    if last is None:
        return
    any_held = several = False
    for document in train:
        # Whether a document is held out depends on its text alone, so equal documents stay on one side.
        held = _hash_fraction(last) < data.validation_fraction
        any_held = any_held or held
        yield last, held
        several, last = True, document
    if several:
        yield last, not any_held or _hash_fraction(last) < data.validation_fraction
        return
    # A single document can't be held out; its end is, from a line's start on.
    cut = last.rfind("\n", 0, int(len(last) * (1 - data.validation_fraction))) + 1
    yield from ((part, held) for part, held in ((last[:cut], False), (last[cut:], True)) if part)


def _read(inputs: str | tuple[str, ...], end_of_text: str, malformed: Mapping[Path, MalformedCounter]) -> Iterator[str]:
    """The documents: the pieces between end-of-text tokens of every text, without the empty ones."""
    if inputs == STANDARD_LIBRARY:
        for path in standard_library_files():
            yield from _split([path.read_bytes().decode("utf-8", "replace")], end_of_text)
        return
    for blocks in byte_texts(expand(inputs), watch=lambda path, block: malformed[path](block)):
        yield from _split(decoded(blocks), end_of_text)


def _split(blocks: Iterable[str], end_of_text: str) -> Iterator[str]:
    overlap = len(end_of_text) - 1
    parts: list[str] = []
    carried = ""
    for block in blocks:
        *complete, rest = (carried + block).split(end_of_text)
        for piece in complete:
            if document := "".join((*parts, piece)).strip("\r\n"):
                yield document
            parts = []
        # The next block may complete an end-of-text token that this one begins.
        kept = max(0, len(rest) - overlap)
        parts.append(rest[:kept])
        carried = rest[kept:]
    if document := "".join((*parts, carried)).strip("\r\n"):
        yield document


def _limited(documents: Iterator[str], maximum_bytes: int | None) -> Iterator[str]:
    taken = 0
    for document in documents:
        taken += len(document.encode("utf-8", "replace"))
        yield document
        if maximum_bytes is not None and taken >= maximum_bytes:
            return


def _hash_fraction(document: str) -> float:
    digest = hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class _Writer:
    """Writes documents to a file that appears when it is complete."""

    def __init__(self, path: Path, end_of_text: str) -> None:
        self.path, self.end = path, f"\n{end_of_text}\n".encode()
        self.documents = self.bytes = 0
        self._hash = hashlib.sha256()
        self._atomic = atomic_write(path)
        self._file: IO[bytes]

    def __enter__(self) -> _Writer:
        self._file = self._atomic.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._atomic.__exit__(*error)

    def write(self, document: str) -> None:
        content = document.encode("utf-8", "replace")
        for part in (content, self.end):
            self._file.write(part)
            self._hash.update(part)
        self.documents += 1
        self.bytes += len(content)

    def split(self) -> Split:
        return Split(self.path, self.documents, self.bytes, self._hash.hexdigest())


def _request(data: DataConfiguration, end_of_text: str) -> dict[str, Any]:
    """What the corpus was made from: another request, or inputs of another size or date, make another corpus."""
    request: dict[str, Any] = {
        "train": data.train,
        "validation": data.validation,
        "validation_fraction": data.validation_fraction,
        "maximum_bytes": data.maximum_bytes,
        "end_of_text": end_of_text,
    }
    inputs = [one for one in (data.train, data.validation) if one is not None and one != STANDARD_LIBRARY]
    request["inputs"] = [[str(path), path.stat().st_size] for one in inputs for path in expand(one)]
    if STANDARD_LIBRARY in (data.train, data.validation):
        request["python"] = sys.version.split()[0]
    return json.loads(json.dumps(request))


def _describe(data: DataConfiguration) -> str:
    if data.train == STANDARD_LIBRARY:
        return f"the standard library of Python {sys.version.split()[0]}"
    names = [data.train] if isinstance(data.train, str) else list(data.train)
    return ", ".join(os.path.basename(name) or name for name in names)


def _from_record(content: dict[str, Any], folder: Path) -> Corpus:
    """The folder may have been moved since: files that were written into it are looked for in it."""
    sides = {}
    for name in ("train", "validation"):
        moved = folder / Path(content[name]["path"]).name
        path = moved if moved.is_file() else Path(content[name]["path"])
        sides[name] = Split(**content[name] | {"path": path})
    return Corpus(content["source"], **sides)
