"""The tokenizer with a memory: each distinct piece of text is merged once, then looked up; documents and files are
shared out between processes.
"""

from __future__ import annotations

import heapq
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from cs336_registry.components.tokenizer import check, missing_byte, special_ids, text_ids, unknown_id
from cs336_registry.text.byte_ranges import byte_ranges
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath, byte_texts, decoded, expand, is_plain, utf8
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import special_token_pattern
from cs336_registry.text.vocab_files import read_merges, read_vocab

from .counting import piece_finder, pretokens_of_piece, range_blocks
from .workers import check_num_workers, run_in_processes

MOST_PIECES = 1 << 19
LONGEST_PIECE = 256
"""Longer pieces hardly come again: they are not remembered."""
ONE_PROCESS_CHARACTERS = 4 << 20
FILE_SHARD = 8 << 20


class Tokenizer:
    """See the contract; `encode_batch` and `encode_files` work in several processes."""

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = GPT2_PATTERN,
    ) -> None:
        self.vocab, self.merges, self.special_tokens = check(vocab, merges, special_tokens, pattern)
        self.pattern = pattern
        self._special_id_of = special_ids(self.vocab, self.special_tokens)
        self._special = special_token_pattern(self.special_tokens)
        self._find_pieces = piece_finder(pattern)
        self._pieces = _Pieces(self.vocab, self.merges, pattern)

    @classmethod
    def from_files(
        cls, vocab_filepath: StrPath, merges_filepath: StrPath, special_tokens: Sequence[str] | None = None
    ) -> Tokenizer:
        return cls(read_vocab(vocab_filepath, special_tokens or ()), read_merges(merges_filepath), special_tokens)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        ids_of = self._pieces.__getitem__
        for part in [text] if self._special is None else self._special.split(text):
            if part in self._special_id_of:
                ids.append(self._special_id_of[part])
            else:
                ids.extend(chain.from_iterable(map(ids_of, self._find_pieces(part))))
        return ids

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        for chunk in safe_chunks(iterable, self.pattern, self.special_tokens):
            yield from self.encode(chunk)

    def decode(self, ids: Iterable[int]) -> str:
        try:
            return b"".join(map(self.vocab.__getitem__, ids)).decode("utf-8", "replace")
        except KeyError as error:
            raise unknown_id(error.args[0]) from None

    def encode_batch(self, texts: Sequence[str], *, num_workers: int | None = None) -> list[list[int]]:
        """The ids of each text, from `num_workers` processes (None: one per processor; short batches stay here)."""
        workers = check_num_workers(num_workers)
        if workers == 1 or sum(map(len, texts)) <= ONE_PROCESS_CHARACTERS:
            return [self.encode(text) for text in texts]
        size, state = -(-len(texts) // (4 * workers)), self._state
        jobs = [(state, texts[start : start + size]) for start in range(0, len(texts), size)]
        arrays = chain.from_iterable(_in_order("cs336_heap_bpe.tokenizer:encode_texts", jobs, workers))
        return [array.tolist() for array in arrays]

    def encode_files(self, input_path: InputPath, *, num_workers: int | None = None) -> Iterator[np.ndarray]:
        """The ids of the files' texts one after another, as arrays of `id_dtype`; nothing is put between texts.

        Plain files are shared out by byte ranges; the arrays come in the order of the text.
        """
        workers, paths, state = check_num_workers(num_workers), expand(input_path), self._state
        for path in paths:
            if is_plain(path):
                ranges = byte_ranges(path, self.pattern, self.special_tokens, FILE_SHARD)
                jobs = [(state, path, start, end) for start, end in ranges]
                yield from _in_order("cs336_heap_bpe.tokenizer:encode_range", jobs, workers)
            else:
                for text in byte_texts(path):
                    for chunk in safe_chunks(decoded(text), self.pattern, self.special_tokens):
                        yield np.array(self.encode(chunk), self.id_dtype)

    @property
    def id_dtype(self) -> np.dtype:
        """The smallest of uint16, uint32 and uint64 that holds every id."""
        largest = max(self.vocab, default=0)
        return np.dtype(np.uint16 if largest < 2**16 else np.uint32 if largest < 2**32 else np.uint64)

    @property
    def _state(self) -> bytes:
        """What a worker makes the same tokenizer of: to be asked for once a call, and shared by its jobs."""
        return pickle.dumps((self.vocab, self.merges, self.special_tokens, self.pattern))


class _Pieces(dict[str, tuple[int, ...]]):
    """The ids of pieces, worked out when first asked for; their pretokens, which are fewer, are remembered too."""

    def __init__(self, vocab: Mapping[int, bytes], merges: Sequence[tuple[bytes, bytes]], pattern: str) -> None:
        super().__init__()
        id_of = text_ids(vocab)
        self._byte_ids = [id_of.get(bytes((byte,)), -1) for byte in range(256)]
        self._merge_of = {
            (id_of[left], id_of[right]): (rank, id_of[left + right]) for rank, (left, right) in enumerate(merges)
        }
        self._find_pretokens = pretokens_of_piece(pattern)
        self._pretokens: dict[str, list[int]] = {}

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = tuple(chain.from_iterable(map(self._ids_of_pretoken, self._find_pretokens(piece))))
        if len(piece) <= LONGEST_PIECE:
            if len(self) >= MOST_PIECES:
                self.clear()
                self._pretokens.clear()
            self[piece] = ids
        return ids

    def _ids_of_pretoken(self, pretoken: str) -> list[int]:
        ids = self._pretokens.get(pretoken)
        if ids is None:
            ids = self._merged(utf8(pretoken))
            if len(pretoken) <= LONGEST_PIECE:
                self._pretokens[pretoken] = ids
        return ids

    def _merged(self, pretoken: bytes) -> list[int]:
        ids = [self._byte_ids[byte] for byte in pretoken]
        if -1 in ids:
            position = ids.index(-1)
            raise missing_byte(pretoken[position : position + 1])
        return self._merge_few(ids) if len(ids) <= 64 else self._merge_many(ids)

    def _merge_few(self, ids: list[int]) -> list[int]:
        """The first merge wherever it stands, again and again: quadratic, and best for words."""
        merge_of = self._merge_of.get
        while len(ids) > 1:
            found = [merge for pair in pairwise(ids) if (merge := merge_of(pair))]
            if not found:
                break
            _, token = best = min(found)
            merged: list[int] = []
            position, last = 0, len(ids) - 1
            while position <= last:
                if position < last and merge_of((ids[position], ids[position + 1])) == best:
                    merged.append(token)
                    position += 2
                else:
                    merged.append(ids[position])
                    position += 1
            ids = merged
        return ids

    def _merge_many(self, ids: list[int]) -> list[int]:
        """The same through a heap of (rank, place) and links between places: n log n for long pretokens."""
        size = len(ids)
        after, before = list(range(1, size + 1)), list(range(-1, size - 1))
        heap: list[tuple[int, int, int, int]] = []

        def consider(place: int) -> None:
            if place >= 0 and after[place] < size:
                pair = ids[place], ids[after[place]]
                if pair in self._merge_of:
                    heapq.heappush(heap, (self._merge_of[pair][0], place, *pair))

        for place in range(size):
            consider(place)
        while heap:
            rank, touched = heap[0][0], []
            # All places of one merge are joined before the pairs they make are looked at.
            while heap and heap[0][0] == rank:
                _, place, left, right = heapq.heappop(heap)
                neighbour = after[place] if ids[place] == left else size
                if neighbour >= size or ids[neighbour] != right:
                    continue
                ids[place], ids[neighbour] = self._merge_of[left, right][1], -1
                after[place] = after[neighbour]
                if after[place] < size:
                    before[after[place]] = place
                touched.append(place)
            for place in touched:
                consider(before[place])
                consider(place)
        return [token for token in ids if token >= 0]


def encode_texts(state: bytes, texts: Sequence[str]) -> list[np.ndarray]:
    """A worker's call: the ids of each text."""
    own = _restored(state)
    return [np.array(own.encode(text), own.id_dtype) for text in texts]


def encode_range(state: bytes, path: Path, start: int, end: int) -> np.ndarray:
    """A worker's call: the ids of a byte range."""
    own = _restored(state)
    chunks = safe_chunks(decoded(range_blocks(path, start, end)), own.pattern, own.special_tokens)
    arrays = [np.array(own.encode(chunk), own.id_dtype) for chunk in chunks]
    return np.concatenate([np.empty(0, own.id_dtype), *arrays])


@lru_cache(maxsize=1)
def _restored(state: bytes) -> Tokenizer:
    vocab, merges, special_tokens, pattern = pickle.loads(state)
    return Tokenizer(vocab, merges, special_tokens, pattern=pattern)


def _in_order(target: str, jobs: Sequence[tuple], num_workers: int) -> Iterator:
    """Results in the order of the jobs, a few jobs a worker ahead at most."""
    ahead = 8 * num_workers
    for first in range(0, len(jobs), ahead):
        waiting, position = {}, 0
        for number, result in run_in_processes(target, jobs[first : first + ahead], num_workers):
            waiting[number] = result
            while position in waiting:
                yield waiting.pop(position)
                position += 1
