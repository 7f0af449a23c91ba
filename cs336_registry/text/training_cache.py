"""What survives a killed training: word counts and merges, found again by the content they came from.

Under `cache_dir/{dataset}/`: `word_counts_{corpus}.bin` (and `shard_{corpus}_{shard}.bin` while counting),
`pair_counts_{corpus}.json`, `merges_{n}_{tie_break}_{corpus}.json`, `vocab_{n}_{tie_break}_{corpus}.json`. `corpus` is
the digest of the files' bytes and kinds, the pattern and the special tokens; worker counts, vocab_size and what files
are called before their suffix are no part of it, so a run may continue with others. Every file carries its format,
version, identity and checksum and is written whole or not at all; one that does not fit is reported by a warning of
this module's logger and built again.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import StrPath, atomic_write, drop_abandoned, write_text
from .inputs import STANDARD_INPUT, kind
from .vocab_files import Merges, Vocab

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

VERSION = 1
CHECKPOINT_EVERY = 300
_DIGEST_BLOCK = 64 << 20
_ITEMS_BLOCK = 1 << 16


@dataclass(frozen=True)
class CorpusIdentity:
    """What word counts depend on: the files' identities, in any order, the pattern, the set of special tokens."""

    files: tuple[tuple[int, str], ...]
    pattern: str
    special_tokens: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        return _digest({"files": sorted(self.files), "pattern": self.pattern, "special": sorted(self.special_tokens)})

    def shard(self, file_number: int, start: int, end: int) -> str:
        """The digest of the bytes from `start` to `end` of one file, with the pattern and the special tokens."""
        what = {"file": self.files[file_number], "range": [start, end]}
        return _digest(what | {"pattern": self.pattern, "special": sorted(self.special_tokens)})


@dataclass(frozen=True)
class WordCounts:
    """Pretokens and their counts as three arrays, sorted by pretoken: the lengths (bytes) cut `text` into pretokens."""

    text: bytes
    lengths: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, counts: Mapping[bytes, int]) -> WordCounts:
        import numpy as np

        pretokens = sorted(counts)
        lengths = np.fromiter(map(len, pretokens), np.uint32, len(pretokens))
        numbers = np.fromiter(map(counts.__getitem__, pretokens), np.int64, len(pretokens))
        return cls(b"".join(pretokens), lengths, numbers)

    @classmethod
    def merged(cls, sources: Iterable[Iterable[tuple[bytes, int]]]) -> WordCounts:
        """The sum of counts that are sorted by pretoken each, read side by side."""
        import numpy as np

        text, lengths, counts = bytearray(), array("I"), array("Q")
        last = None
        for pretoken, count in heapq.merge(*sources):
            if pretoken == last:
                counts[-1] += count
                continue
            last = pretoken
            text += pretoken
            lengths.append(len(pretoken))
            counts.append(count)
        return cls(bytes(text), np.array(lengths, np.uint32), np.array(counts, np.int64))

    def items(self) -> Iterator[tuple[bytes, int]]:
        """(pretoken, count) in order; as objects only a block at a time."""
        import numpy as np

        text, end = self.text, 0
        for first in range(0, len(self.counts), _ITEMS_BLOCK):
            block = slice(first, first + _ITEMS_BLOCK)
            ends = (end + np.cumsum(self.lengths[block], dtype=np.int64)).tolist()
            pretokens = [text[start:stop] for start, stop in zip([end, *ends], ends, strict=False)]
            yield from zip(pretokens, self.counts[block].tolist(), strict=True)
            end = ends[-1]

    def to_dict(self) -> dict[bytes, int]:
        return dict(self.items())

    @property
    def num_bytes(self) -> int:
        """How much text was counted, without special tokens."""
        return int(self.lengths @ self.counts)


def identify(paths: Sequence[Path], special_tokens: Sequence[str], pattern: str) -> CorpusIdentity | None:
    """The identity of a corpus, from every byte of its files; None for standard input, which can't be read twice."""
    if STANDARD_INPUT in paths or not all(path.is_file() for path in paths):
        logger.warning("standard input can't be identified before it is read: counting and training without the cache")
        return None
    return CorpusIdentity(tuple(map(file_identity, paths)), pattern, tuple(special_tokens))


def file_identity(path: Path) -> tuple[int, str]:
    """A file's size (bytes) and the digest of its content: of the digests of its 64 MiB blocks, which threads share.

    How the file is read (`inputs.kind`) is part of the digest: the same bytes are other texts as .txt and as .jsonl.
    """
    size = path.stat().st_size

    def digest_of_block(start: int) -> bytes:
        state, left = hashlib.blake2b(digest_size=32), _DIGEST_BLOCK
        with open(path, "rb") as file:
            file.seek(start)
            while left and (block := file.read(min(left, 1 << 20))):
                state.update(block)
                left -= len(block)
        return state.digest()

    with ThreadPoolExecutor() as threads:
        digests = threads.map(digest_of_block, range(0, max(size, 1), _DIGEST_BLOCK))
        content = hashlib.blake2b(b"".join(digests), digest_size=16, person=kind(path).encode())
    return size, content.hexdigest()


def dataset_name(paths: Sequence[Path]) -> str:
    """A folder name for people: the file's name without its suffixes, or the folder's for several files."""
    name = paths[0].name.split(".")[0] if len(paths) == 1 else paths[0].absolute().parent.name
    return re.sub(r"[^\w-]+", "_", name) or "corpus"


class TrainingCache:
    """The cache of one corpus. What is missing, damaged, of another version or of another corpus loads as nothing."""

    def __init__(self, cache_dir: StrPath, paths: Sequence[Path], identity: CorpusIdentity) -> None:
        self.folder = Path(cache_dir) / dataset_name(paths)
        self.identity = identity

    # Counting

    def load_word_counts(self) -> WordCounts | None:
        """The counts of the whole corpus. Shards that lie beside them are dropped: who wrote them was killed at it."""
        counts = _load_counts(self._word_counts_path, self.identity.digest)
        if counts is not None:
            self._drop_shards()
        return counts

    def save_word_counts(self, counts: WordCounts) -> None:
        """Keep the counts of the whole corpus and drop those of its shards."""
        _save_counts(self._word_counts_path, self.identity.digest, counts)
        self._drop_shards()

    def load_shard(self, shard: str) -> WordCounts | None:
        return _load_counts(self._shard_path(shard), shard)

    def save_shard(self, shard: str, counts: WordCounts) -> None:
        _save_counts(self._shard_path(shard), shard, counts)

    # Merging

    def load_merges(self, tie_break: str) -> Merges:
        """The longest sound list of merges that was kept; empty where there is none."""
        for number in sorted(self._checkpoints(tie_break), reverse=True):
            content = _load_json(self._path("merges", number, tie_break), self._run(tie_break))
            if content is not None and len(content) == number:
                return [(from_readable(left), from_readable(right)) for left, right in content]
        return []

    def save_checkpoint(self, merges: Merges, vocab: Vocab, tie_break: str) -> None:
        """Keep merges and vocab, for people and for a later run, in place of shorter ones; a longer list stays."""
        earlier = self._checkpoints(tie_break)
        if any(number >= len(merges) and len(self.load_merges(tie_break)) >= len(merges) for number in earlier):
            return
        run, number = self._run(tie_break), len(merges)
        readable_vocab = {str(token_id): to_readable(token) for token_id, token in vocab.items()}
        _save_json(self._path("vocab", number, tie_break), run, readable_vocab)
        _save_json(self._path("merges", number, tie_break), run, [list(map(to_readable, merge)) for merge in merges])
        for old in earlier:
            if old != number:
                self._path("merges", old, tie_break).unlink(missing_ok=True)
                self._path("vocab", old, tie_break).unlink(missing_ok=True)

    def forget_merges(self, tie_break: str, reason: object) -> None:
        """Drop the merges that were kept: they are not this corpus's, whatever their checksum says."""
        for number in self._checkpoints(tie_break):
            _rejected(self._path("merges", number, tie_break), str(reason))
            self._path("merges", number, tie_break).unlink(missing_ok=True)
            self._path("vocab", number, tie_break).unlink(missing_ok=True)

    def save_pair_counts(self, pair_counts: Mapping[tuple[bytes, bytes], int]) -> None:
        """Keep the counts of neighbouring bytes before the first merge, most frequent first, for people to read."""
        ordered = sorted(pair_counts.items(), key=lambda item: (-item[1], item[0]))
        rows = [[to_readable(left), to_readable(right), count] for (left, right), count in ordered]
        _save_json(self.folder / f"pair_counts_{self.identity.digest}.json", self.identity.digest, rows)

    def _drop_shards(self) -> None:
        for path in self.folder.glob(f"shard_{self.identity.digest}_*.bin"):
            path.unlink(missing_ok=True)
        drop_abandoned(self.folder)

    @property
    def _word_counts_path(self) -> Path:
        return self.folder / f"word_counts_{self.identity.digest}.bin"

    def _shard_path(self, shard: str) -> Path:
        return self.folder / f"shard_{self.identity.digest}_{shard}.bin"

    def _run(self, tie_break: str) -> str:
        return f"{tie_break}_{self.identity.digest}"

    def _path(self, kind: str, number: int, tie_break: str) -> Path:
        return self.folder / f"{kind}_{number}_{self._run(tie_break)}.json"

    def _checkpoints(self, tie_break: str) -> list[int]:
        paths = self.folder.glob(f"merges_*_{self._run(tie_break)}.json")
        return [int(match[1]) for path in paths if (match := re.match(r"merges_(\d+)_", path.name))]


def to_readable(token: bytes) -> str | dict[str, str]:
    """A token for JSON: its text, or {"hex": ...} where it is not UTF-8."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return {"hex": token.hex()}


def from_readable(content: str | Mapping[str, str]) -> bytes:
    return content.encode() if isinstance(content, str) else bytes.fromhex(content["hex"])


def _digest(what: Any) -> str:
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=12).hexdigest()


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _rejected(path: Path, reason: str) -> None:
    logger.warning("%s is not used: %s; it will be built again", path, reason)


def _save_counts(path: Path, identity: str, counts: WordCounts) -> None:
    lengths, numbers = counts.lengths.astype("<u4").tobytes(), counts.counts.astype("<i8").tobytes()
    payload = b"".join((lengths, numbers, counts.text))
    with atomic_write(path) as file:
        file.write(_header("word_counts", identity, len(counts.counts), payload) + b"\n")
        file.write(payload)


def _load_counts(path: Path, identity: str) -> WordCounts | None:
    import numpy as np

    if not path.exists():
        return None
    with open(path, "rb") as file:
        header, payload = file.readline(1 << 16), file.read()
    reason = _misfit(header, "word_counts", identity, payload)
    if reason:
        return _rejected(path, reason)
    entries = json.loads(header)["entries"]
    lengths = np.frombuffer(payload, "<u4", entries)
    return WordCounts(payload[12 * entries :], lengths, np.frombuffer(payload, "<i8", entries, 4 * entries))


def _save_json(path: Path, identity: str, content: Any) -> None:
    """A header line, then the content as JSON with an entry a line."""
    if isinstance(content, list):
        body = "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in content) + "\n]\n"
    else:
        body = json.dumps(content, ensure_ascii=False, indent=0) + "\n"
    header = _header("json", identity, len(content), body.encode()).decode()
    write_text(path, f'{{"header": {header},\n"content": {body}}}\n')


def _load_json(path: Path, identity: str) -> Any:
    try:
        first, rest = path.read_bytes().split(b"\n", 1)
    except (FileNotFoundError, ValueError):
        return _rejected(path, "it is missing or cut short")
    header = first.removeprefix(b'{"header": ').removesuffix(b",")
    body = rest.removeprefix(b'"content": ').removesuffix(b"}\n")
    reason = _misfit(header, "json", identity, body)
    return _rejected(path, reason) if reason else json.loads(body)


def _header(kind: str, identity: str, entries: int, payload: bytes) -> bytes:
    header = {"format": kind, "version": VERSION, "identity": identity, "entries": entries}
    checksum = _checksum(json.dumps(header).encode() + payload)
    return json.dumps({**header, "checksum": checksum}).encode()


def _misfit(header: bytes, kind: str, identity: str, payload: bytes) -> str:
    """Why a file is not the one asked for, or an empty string."""
    try:
        found = json.loads(header)
        version, owner, entries = (found[key] for key in ("version", "identity", "entries"))
    except (ValueError, KeyError, TypeError):
        return "its header is damaged"
    if version != VERSION:
        return f"it has version {version}, not {VERSION}"
    if owner != identity:
        return "it belongs to another corpus, pattern, special tokens or tie-break"
    return "" if header.strip() == _header(kind, identity, entries, payload) else "its checksum is wrong"
