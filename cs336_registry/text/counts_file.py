"""Word counts as files that machines hand to each other: counted apart, merged, trained from.

The layout is the training cache's (`training_cache.py`): a header line of JSON, then the lengths (uint32), the counts
(int64) and the bytes of the pretokens, sorted. Here the header's identity is spelt out: pattern, special tokens, and
which bytes of which contents were counted (size and digest of the file, start and end), so that nothing is counted
twice, whatever files are called and whoever counted them. Reading and merging stream, in bounded memory.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

from .files import StrPath, atomic_write
from .training_cache import VERSION, CorpusIdentity, WordCounts

FORMAT = "word_counts"
BLOCK_BYTES = 1 << 20
MOST_RECORDS_HELD = 1 << 19
"""Records that a merge holds, over all its files."""
LARGEST_COUNT = 2**63 - 1


@dataclass(frozen=True, order=True)
class Shard:
    """The bytes from `start` to `end` of a file of `size` bytes with this digest (`training_cache.file_identity`)."""

    size: int
    digest: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"bytes {self.start:,} to {self.end:,} of the file of {self.size:,} bytes with digest {self.digest[:12]}"


@dataclass(frozen=True)
class CountsIdentity:
    """What counts are of. Shards that touch are one, so a file that was counted in parts is that file."""

    pattern: str
    special_tokens: tuple[str, ...]
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shards", joined(self.shards))

    def to_text(self) -> str:
        rows = [[shard.size, shard.digest, shard.start, shard.end] for shard in self.shards]
        return json.dumps({"pattern": self.pattern, "special_tokens": list(self.special_tokens), "shards": rows})

    @classmethod
    def from_text(cls, text: str) -> CountsIdentity:
        content = json.loads(text)
        shards = tuple(Shard(int(size), str(digest), int(a), int(b)) for size, digest, a, b in content["shards"])
        return cls(str(content["pattern"]), tuple(map(str, content["special_tokens"])), shards)

    @property
    def corpus(self) -> CorpusIdentity:
        """The same for the training cache: of whole files it is what training on those files has."""
        whole = all((shard.start, shard.end) == (0, shard.size) for shard in self.shards)
        files = [
            (shard.size, shard.digest if whole else f"{shard.digest}[{shard.start}:{shard.end}]")
            for shard in self.shards
        ]
        return CorpusIdentity(tuple(files), self.pattern, self.special_tokens)


def joined(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """The shards in order, without empty ones, and with neighbouring ranges of one content as one."""
    found: list[Shard] = []
    for shard in sorted(shard for shard in shards if shard.start < shard.end):
        last = found[-1] if found else None
        if last and (last.size, last.digest, last.end) == (shard.size, shard.digest, shard.start) and shard.start:
            found[-1] = Shard(last.size, last.digest, last.start, shard.end)
        else:
            found.append(shard)
    return tuple(found)


def overlap(shards: Iterable[Shard]) -> Shard | None:
    """A shard whose text is in another one, too; None where no byte would be counted twice."""
    for one, other in pairwise(sorted(shard for shard in shards if shard.start < shard.end)):
        if (one.size, one.digest) == (other.size, other.digest) and other.start < one.end:
            return other
    return None


class CountsFile:
    """A file of counts, checked as a whole when it is opened; its records are read as they are asked for."""

    def __init__(self, path: StrPath) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {path}: pass a file that cs336 counts build wrote")
        with open(self.path, "rb") as file:
            header = file.readline(1 << 28)
            self._begin = file.tell()
            try:
                content = json.loads(header)
                kind, version, identity, entries, checksum = (
                    content[key] for key in ("format", "version", "identity", "entries", "checksum")
                )
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is not a file of counts: pass one that cs336 counts build wrote") from None
            if (kind, version) != (FORMAT, VERSION):
                raise ValueError(f"{path} is {kind!r}, version {version}: expected {FORMAT!r}, version {VERSION}")
            state = _checksum_state(identity, entries)
            while block := file.read(BLOCK_BYTES):
                state.update(block)
        if state.hexdigest() != checksum:
            raise ValueError(f"{path} is damaged (its checksum is wrong): copy it again, or count its shards again")
        try:
            self.identity = CountsIdentity.from_text(identity)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path} does not say which shards it counted (it is of a training cache): use cs336 counts build"
            ) from None
        self.entries: int = entries

    def records(self, block: int = 1 << 16) -> Iterator[tuple[bytes, int]]:
        """(pretoken, count) in the order of the pretokens; `block` of them are in memory."""
        import numpy as np

        text_at = self._begin + 12 * self.entries
        for first in range(0, self.entries, block):
            number = min(block, self.entries - first)
            with open(self.path, "rb") as file:
                file.seek(self._begin + 4 * first)
                ends = np.cumsum(np.frombuffer(file.read(4 * number), "<u4"), dtype=np.int64).tolist()
                file.seek(self._begin + 4 * self.entries + 8 * first)
                counts = np.frombuffer(file.read(8 * number), "<i8").tolist()
                file.seek(text_at)
                text = file.read(ends[-1])
            text_at += ends[-1]
            yield from zip((text[a:b] for a, b in pairwise(chain((0,), ends))), counts, strict=True)

    def words(self) -> WordCounts:
        """All of it in memory, as the trainers take it."""
        import numpy as np

        with open(self.path, "rb") as file:
            file.seek(self._begin)
            lengths = np.frombuffer(file.read(4 * self.entries), "<u4")
            counts = np.frombuffer(file.read(8 * self.entries), "<i8")
            return WordCounts(file.read(), lengths, counts)


def write(path: StrPath, identity: CountsIdentity, words: WordCounts) -> None:
    """Write counts that are in memory."""
    sections = [words.lengths.astype("<u4").tobytes(), words.counts.astype("<i8").tobytes(), words.text]
    _write(path, identity, len(words.counts), lambda: sections)


def merge(
    files: Sequence[CountsFile],
    out: StrPath,
    *,
    duplicates: str = "refuse",
    report: Callable[[int], None] | None = None,
) -> tuple[CountsIdentity, int]:
    """Add up files of counts into `out`, record by record; returns what they are of, and how many pretokens.

    duplicates: "refuse" raises ValueError where two files counted the same bytes, "skip" leaves out a file of which
    every shard is in another one. Raises ValueError where patterns or special tokens differ, OverflowError where a
    sum passes 63 bits. report is told how many records were read.
    """
    files, identity = _compatible(files, duplicates)
    block = max(64, MOST_RECORDS_HELD // len(files))
    folder = Path(os.path.realpath(out)).parent
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".counts-", dir=folder)))
        names = [temporary / name for name in ("lengths", "counts", "text")]
        entries = _merge_into(names, heapq.merge(*(file.records(block) for file in files)), report)
        _write(out, identity, entries, lambda: chain.from_iterable(map(_blocks, names)))
    return identity, entries


def _compatible(files: Sequence[CountsFile], duplicates: str) -> tuple[list[CountsFile], CountsIdentity]:
    """The files to add and the identity of their sum."""
    if not files:
        raise ValueError("no file of counts was given: pass those that cs336 counts build wrote")
    if duplicates == "skip":
        # The larger first, so that what they hold is found to be there already.
        files = sorted(files, key=lambda file: -sum(shard.end - shard.start for shard in file.identity.shards))
    first = files[0]
    kept: list[CountsFile] = []
    shards: tuple[Shard, ...] = ()
    for file in files:
        identity = file.identity
        for what in ("pattern", "special_tokens"):
            ours, theirs = getattr(first.identity, what), getattr(identity, what)
            if sorted(ours) != sorted(theirs) if what == "special_tokens" else ours != theirs:
                raise ValueError(
                    f"{file.path} was counted with {what} {theirs!r}, {first.path} with {ours!r}: count both alike"
                )
        twice = overlap((*shards, *identity.shards))
        if twice is None:
            kept.append(file)
            shards = joined((*shards, *identity.shards))
        elif duplicates != "skip" or not all(_is_within(shard, shards) for shard in identity.shards):
            cure = "leave it out" if duplicates == "skip" else "leave it out, or pass --duplicates skip"
            raise ValueError(f"{file.path} counts again what another file has counted, {twice}: {cure}")
    return kept, CountsIdentity(first.identity.pattern, first.identity.special_tokens, shards)


def _is_within(shard: Shard, shards: Iterable[Shard]) -> bool:
    return any(
        (one.size, one.digest) == (shard.size, shard.digest) and one.start <= shard.start and shard.end <= one.end
        for one in shards
    )


def _merge_into(
    names: Sequence[Path], records: Iterable[tuple[bytes, int]], report: Callable[[int], None] | None
) -> int:
    """Write the sums of sorted records as three files; returns how many there are."""
    import numpy as np

    entries = read = 0
    pretokens: list[bytes] = []
    counts: list[int] = []
    with ExitStack() as stack:
        files = [stack.enter_context(open(name, "wb")) for name in names]

        def flush() -> None:
            files[0].write(np.fromiter(map(len, pretokens), "<u4", len(pretokens)).tobytes())
            files[1].write(np.array(counts, "<i8").tobytes())
            files[2].write(b"".join(pretokens))
            pretokens.clear()
            counts.clear()
            if report is not None:
                report(read)

        last = None
        for pretoken, count in records:
            read += 1
            if pretoken == last:
                counts[-1] += count
                if counts[-1] > LARGEST_COUNT:
                    raise OverflowError(f"{pretoken!r} was counted {counts[-1]} times, and counts have 63 bits")
                continue
            if len(pretokens) >= 1 << 16:
                flush()
            last = pretoken
            pretokens.append(pretoken)
            counts.append(count)
            entries += 1
        flush()
    return entries


def _write(path: StrPath, identity: CountsIdentity, entries: int, payload: Callable[[], Iterable[bytes]]) -> None:
    """Header and payload, which is gone through twice: the checksum stands before it."""
    state = _checksum_state(identity.to_text(), entries)
    for block in payload():
        state.update(block)
    header = {**_header(identity.to_text(), entries), "checksum": state.hexdigest()}
    with atomic_write(path) as file:
        file.write(json.dumps(header).encode() + b"\n")
        for block in payload():
            file.write(block)


def _header(identity: str, entries: int) -> dict[str, object]:
    return {"format": FORMAT, "version": VERSION, "identity": identity, "entries": entries}


def _checksum_state(identity: str, entries: int) -> hashlib.blake2b:
    return hashlib.blake2b(json.dumps(_header(identity, entries)).encode(), digest_size=16)


def _blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block
