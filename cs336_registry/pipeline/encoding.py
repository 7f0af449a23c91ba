"""Encoding any text with a tokenizer folder, outside a run.

One plain file is encoded where it lies. Anything else (packed files, .jsonl, .parquet, several files, standard input)
is first written out as one plain text beside the result, with the end-of-text token between its texts; the text stays
until the encoding is complete, so that an interrupted one continues.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..text.files import atomic_write, write_json
from ..text.inputs import STANDARD_INPUT, MalformedCounter, byte_texts, decoded, expand, is_plain
from . import corpus, tokens
from .corpus import Split
from .progress import Progress
from .tokenization import RunTokenizer

if TYPE_CHECKING:
    import numpy as np

REPLACEMENT = "\ufffd".encode()
LOOKED_THROUGH = 1 << 20
"""Ids that are compared at once."""


def encode(
    inputs: Sequence[str],
    tokenizer: RunTokenizer,
    out: Path,
    progress: Progress,
    *,
    workers: int = 1,
    backend: str | None = None,
) -> tokens.Tokens:
    """The ids of all texts of `inputs`, in `out` (.npy, uint16 or uint32); what is known of them is in a .json beside.

    Raises ValueError where several texts need an end-of-text token and the tokenizer has none, or an input stands where
    the result goes, and MismatchError where `out` holds other ids.
    """
    paths = expand(list(inputs))
    texts = {path.resolve() for path in paths}
    for result in (out, out.with_suffix(".json")):
        if result.resolve() in texts:
            raise ValueError(f"{result} is one of the texts, and --out {out} writes to it: choose another --out")
    separator = tokenizer.end_of_text
    if len(paths) == 1 and is_plain(paths[0]) and paths[0].is_file():
        split = corpus.measure(paths[0], separator, progress)
        found = tokens.prepare(split, tokenizer, out, progress, workers=workers, backend=backend)
        if _may_have_replacements(found.ids, tokenizer.tokenizer.vocab):
            _tell_malformed({paths[0]: _malformed(paths[0])}, progress)
        return found
    malformed: defaultdict[Path, MalformedCounter] = defaultdict(MalformedCounter)
    split = _written_out(paths, separator, out, progress, malformed)
    found = tokens.prepare(split, tokenizer, out, progress, workers=workers, backend=backend)
    split.path.unlink()
    split.path.with_suffix(".json").unlink()
    _tell_malformed(malformed, progress)
    return found


def _written_out(
    paths: Sequence[Path],
    separator: str,
    out: Path,
    progress: Progress,
    malformed: Mapping[Path, MalformedCounter],
) -> Split:
    """The texts as one plain file beside `out`, taken over from an interrupted run where the inputs are the same."""
    name = f".{out.stem}.text-{_state_of(paths)}"
    path = out.absolute().with_name(name + ".txt")
    record = path.with_suffix(".json")
    if STANDARD_INPUT not in paths and record.is_file() and path.is_file():
        return Split(**{**json.loads(record.read_text(encoding="utf-8")), "path": path})
    with progress.stage("reading the text", unit="B") as stage, atomic_write(path) as file:
        watched = byte_texts(paths, watch=lambda file, block: malformed[file](block))
        for number, blocks in enumerate(watched):
            if number and not separator:
                raise ValueError(
                    "the tokenizer has no special token to put between several texts: encode them one at a time"
                )
            file.write(separator.encode() if number else b"")
            for block in _clean(blocks):
                file.write(block)
                stage.advance(len(block))
    split = corpus.measure(path, separator, progress)
    write_json(record, {**asdict(split), "path": path.name})
    return split


def _clean(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks as sound UTF-8: malformed bytes at a text's end must not join with what follows."""
    return (text.encode() for text in decoded(blocks) if text)


def _may_have_replacements(ids: np.ndarray, vocab: Mapping[int, bytes]) -> bool:
    """Whether U+FFFD can be in the text of `ids`, its own or in place of malformed bytes: some token holds it, or ends
    as it begins. Quicker than looking at the text, and few texts have one of these tokens."""
    begins = (REPLACEMENT[:1], REPLACEMENT[:2])
    wanted = [number for number, token in vocab.items() if REPLACEMENT in token or token.endswith(begins)]
    chunks = (ids[start : start + LOOKED_THROUGH] for start in range(0, len(ids), LOOKED_THROUGH))
    return any((chunk == number).any() for chunk in chunks for number in wanted)


def _malformed(path: Path) -> MalformedCounter:
    counter = MalformedCounter()
    for blocks in byte_texts(path):
        for block in blocks:
            counter(block)
    return counter


def _tell_malformed(malformed: Mapping[Path, MalformedCounter], progress: Progress) -> None:
    for path, counter in malformed.items():
        if counter.total:
            name = "standard input" if path == STANDARD_INPUT else path
            progress.say(
                f"warning: {name} is not UTF-8 everywhere: {counter.total:,} malformed sequences of bytes were "
                f"replaced by U+FFFD; if it has another encoding, convert it first, as iconv does"
            )


def _state_of(paths: Sequence[Path]) -> str:
    """Changes with the names, sizes and dates of the files."""
    states = [[str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
