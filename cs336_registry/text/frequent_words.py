"""The most frequent pretokens of a training corpus with their token ids, kept beside its tokenizer, so that an encoder
knows them before its first text. They change no id: a file that is missing, damaged or another tokenizer's is not used.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .files import StrPath, atomic_write

if TYPE_CHECKING:
    import numpy as np

    from .training_cache import WordCounts

logger = logging.getLogger(__name__)

NAME = "frequent_words.bin"
MOST_WORDS = 1 << 18
LONGEST_WORD = 255
_MAGIC = b"cs336 frequent words 1\n"
_HEADER = struct.Struct("<16s16sQ")


@dataclass(frozen=True)
class FrequentWords:
    """Words one after another in `text`, the most frequent first; a byte each for their lengths and numbers of ids;
    all ids as little-endian uint32."""

    lengths: bytes
    id_counts: bytes
    text: bytes
    ids: bytes

    @classmethod
    def of(cls, words: Sequence[bytes], ids: np.ndarray, id_starts: np.ndarray) -> FrequentWords:
        """`ids` of all words one after another, those of word i from id_starts[i]."""
        id_counts = (id_starts[1:] - id_starts[:-1]).astype("u1").tobytes()
        return cls(bytes(map(len, words)), id_counts, b"".join(words), ids.astype("<u4").tobytes())

    def __len__(self) -> int:
        return len(self.lengths)


def most_frequent(counts: WordCounts, most: int = MOST_WORDS) -> list[bytes]:
    """Up to `most` pretokens of at most 255 bytes that occur more than once, the most frequent first."""
    import numpy as np

    eligible = np.flatnonzero((counts.counts > 1) & (counts.lengths > 0) & (counts.lengths <= LONGEST_WORD))
    order = eligible[np.argsort(-counts.counts[eligible], kind="stable")[:most]]
    ends = np.cumsum(counts.lengths, dtype=np.int64)
    starts = ends - counts.lengths
    text = counts.text
    return [text[start:end] for start, end in zip(starts[order].tolist(), ends[order].tolist(), strict=True)]


def tokenizer_key(vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Sixteen bytes that change with anything that a pretoken's ids depend on."""
    digest = hashlib.blake2b(digest_size=16)
    tokens = [vocab[token_id] for token_id in sorted(vocab)]
    parts = [part for merge in merges for part in merge]
    for content in (array("Q", sorted(vocab)), array("Q", map(len, tokens)), array("Q", map(len, parts))):
        digest.update(len(content).to_bytes(8, "little") + _little_endian(content).tobytes())
    digest.update(b"".join(tokens) + b"".join(parts))
    return digest.digest()


def write(folder: StrPath, words: FrequentWords, key: bytes) -> None:
    """Write `frequent_words.bin` into the folder of the tokenizer with this key."""
    body = words.lengths + words.id_counts + words.text + words.ids
    with atomic_write(Path(folder) / NAME) as file:
        file.write(_MAGIC + _HEADER.pack(hashlib.blake2b(key + body, digest_size=16).digest(), key, len(words)) + body)


def read(folder: StrPath, key: bytes) -> FrequentWords | None:
    """What `write` wrote for the tokenizer with this key; None, with a warning unless nothing is there, otherwise."""
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    content = path.read_bytes()
    start = len(_MAGIC) + _HEADER.size
    if not content.startswith(_MAGIC) or len(content) < start:
        return _refused(path, "it is damaged")
    checksum, owner, number = _HEADER.unpack_from(content, len(_MAGIC))
    body = content[start:]
    if hashlib.blake2b(owner + body, digest_size=16).digest() != checksum:
        return _refused(path, "it is damaged")
    if owner != key:
        return _refused(path, "it belongs to another tokenizer")
    lengths, id_counts = body[:number], body[number : 2 * number]
    end = 2 * number + sum(lengths)
    return FrequentWords(lengths, id_counts, body[2 * number : end], body[end:])


def _refused(path: Path, reason: str) -> None:
    logger.warning("%s is not used: %s; encoding only starts slower without it", path, reason)


def _little_endian(numbers: array) -> array:
    import sys

    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
