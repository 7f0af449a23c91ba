"""The encoder's table and the vocabulary as arrays; text is fed through `text_buffer.py`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cs336_registry.components.tokenizer import missing_byte, special_ids, text_ids
from cs336_registry.text.frequent_words import FrequentWords

from . import blocks
from .calling import RepeatedCalls
from .character_classes import load_character_classes
from .compile_cache import default_cache_folder, load_kernels
from .constants import (
    DONE,
    MAX_CACHED_BYTES,
    MAX_LOAD_DENOMINATOR,
    MAX_LOAD_NUMERATOR,
    MISSING_BYTE,
    NEEDED,
    NEEDS_ARENA,
    NEEDS_OUTPUT,
    NEEDS_SCRATCH,
    NEEDS_TABLE,
    NOT_UTF8,
    OUTPUT_USED,
    SCRATCH_WORDS,
    SHORT_UP_TO,
    SHORT_WORD,
    STATE_LENGTH,
    STATUS,
    UNIQUE,
)
from .count_table import WordCounts
from .special_token_table import SpecialTokenTable, build_special_token_table

NO_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)
MAX_ID = 2**31 - 1
MAX_SLOTS = 1 << 21
"""64 MiB of slots, 1.3 million pretokens: when it is full it starts again from the seeds, so memory stays bounded."""
STREAM_SLOTS = 1 << 17
"""The same for text that streams through: 4 MiB of slots."""
ARENA_BYTES_PER_SLOT = 8
FIRST_SLOTS = 1 << 14
QUICK_SLOTS = 1 << 18
"""4 MiB of slots for the most frequent short pretokens: enough to get huge pages, and few pretokens share a place."""
MAX_ENDS = 1 << 12
"""Pretokens found at a time: few enough for their ends to stay in the first-level cache."""
NO_MERGE = 1 << 62


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True)
class EncoderVocab:
    """What does not change between threads: ids of bytes, merges by pair, special tokens, words to begin with."""

    pattern: int
    special_tokens: SpecialTokenTable
    special_ids: np.ndarray
    byte_ids: np.ndarray
    byte_merges: np.ndarray
    short_up_to: int
    merge_table: np.ndarray
    seeds: WordCounts
    known: FrequentWords | None
    narrow: bool

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.narrow else np.uint32)


def build_encoder_vocab(
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    special_tokens: Sequence[str],
    pattern: int,
    cache_folder: Path | None = None,
    seed_words: Iterable[bytes] = (),
    frequent_words: FrequentWords | None = None,
) -> EncoderVocab:
    """Arrays for the encoder. The seeds are `seed_words`, then the vocab's own tokens; then `frequent_words`."""
    id_of, special_id_of = text_ids(vocab), special_ids(vocab, special_tokens)
    table = build_special_token_table(special_tokens)
    merge_table = np.zeros((1 << (len(merges) // 4).bit_length(), 16), np.uint64)
    merge_table[:, :8] = NO_KEY
    columns = [[id_of[left] for left, _ in merges], [id_of[right] for _, right in merges], range(len(merges))]
    results = [id_of[left + right] for left, right in merges]
    load_kernels("encode", cache_folder).put_merges(
        *(np.array(column, np.int32) for column in (*columns, results)), merge_table
    )
    byte_ids = [id_of.get(bytes((byte,)), -1) for byte in range(256)]
    seeds = dict.fromkeys((*seed_words, *id_of), 1)
    return EncoderVocab(
        pattern=pattern,
        special_tokens=table,
        special_ids=np.array([special_id_of[special_tokens[index]] for index in table.order.tolist()], np.int32),
        byte_ids=np.array(byte_ids, np.int32),
        byte_merges=_byte_merges(merges, results),
        short_up_to=SHORT_WORD if _makes_later_pairs(*columns[:2], results) else 0,
        merge_table=merge_table,
        seeds=WordCounts.from_dict({word: 1 for word in seeds if 0 < len(word) <= MAX_CACHED_BYTES}),
        known=frequent_words,
        narrow=max(vocab) < 1 << 16,
    )


def _byte_merges(merges: Sequence[tuple[bytes, bytes]], results: Sequence[int]) -> np.ndarray:
    """What each pair of bytes becomes, as the kernels look it up: rank * 2**32 + id, or NO_MERGE."""
    found = np.full(1 << 16, NO_MERGE, np.int64)
    for rank, ((left, right), result) in enumerate(zip(merges, results, strict=True)):
        if len(left) == len(right) == 1:
            found[left[0] << 8 | right[0]] = rank << 32 | result
    return found


def _makes_later_pairs(left: Sequence[int], right: Sequence[int], results: Sequence[int]) -> bool:
    """Whether every pair that a merge makes comes after it, since the tokens of each pair were all made before it."""
    made = dict(zip(results, range(len(results)), strict=True))
    before = [
        np.fromiter((made.get(token, -1) for token in tokens), np.int64, len(results)) for tokens in (left, right)
    ]
    return bool((np.maximum(*before) < np.arange(len(results))).all())


def _slots(number: int) -> np.ndarray:
    """Empty slots. They begin at a page, so that none of them lies in two cache lines, as numpy's would."""
    return np.asarray(blocks.zeros("Q", number, 4))


def _quick_slots(number: int) -> np.ndarray:
    """Empty slots, and one that is read beyond the last."""
    return np.asarray(blocks.zeros("Q", number + 1, 2))


class EncodeTable:
    """Pretokens that were met, with their ids; one for each thread. Ids wait in `output` until `take` is called."""

    def __init__(
        self,
        vocab: EncoderVocab,
        cache_folder: Path | None = None,
        *,
        seeded: bool = True,
        max_slots: int | None = None,
    ) -> None:
        self.vocab = vocab
        self.kernels = load_kernels("encode", cache_folder)
        self.classes = load_character_classes(cache_folder or default_cache_folder())
        self.seeded, self.max_slots = seeded, max_slots or MAX_SLOTS
        self._make_buffers()
        self.state = np.zeros(STATE_LENGTH, np.int64)
        self._clear()

    def _make_buffers(self) -> None:
        self._encode_block = RepeatedCalls(self.kernels.encode_block)
        self.scratch = np.empty(SCRATCH_WORDS, np.uint64)
        self.ends = np.empty(MAX_ENDS, np.int64)
        self.output = np.empty((1 << 16) + 16, np.uint8)
        self._make_scratch(MAX_CACHED_BYTES)

    def _make_scratch(self, length: int) -> None:
        heap_length = 3 * length + 8
        self.merging = (
            np.empty(length, np.int64), np.empty(max(length, SHORT_WORD), np.int64), np.empty(length, np.int64),
            np.empty(heap_length, np.int64), np.empty(heap_length, np.int64),
        )  # fmt: skip

    def _clear(self) -> None:
        used = self.state[OUTPUT_USED]
        self.quick, self.table = _quick_slots(min(QUICK_SLOTS, self.max_slots // 4)), _slots(FIRST_SLOTS)
        self.arena, self.ids_arena = np.empty(1 << 16, np.uint8), np.empty(1 << 16, np.int32)
        self.state = np.zeros(STATE_LENGTH, np.int64)
        self.state[OUTPUT_USED], self.state[SHORT_UP_TO] = used, self.vocab.short_up_to
        seeds, most = self.vocab.seeds, self.max_slots * MAX_LOAD_NUMERATOR // MAX_LOAD_DENOMINATOR // 2
        if not self.seeded or len(seeds) >= most:
            return
        known = self.vocab.known
        number = 0 if known is None else min(len(known), most - len(seeds))
        self._grow_table(min(2 * (number + len(seeds)), 2 * most))  # room for as many more
        if known is not None:
            self._put_known_words(known, number)
        self._grow_arenas(seeds.num_bytes + len(seeds))
        self.kernels.encode_words(seeds.word_bytes, seeds.word_starts, *self._tables, *self._merging, self.vocab.narrow)

    def copy(self) -> EncodeTable:
        """A table for another thread, which knows the same pretokens."""
        other = copy.copy(self)
        other._make_buffers()
        other.quick, other.table = _quick_slots(len(self.quick) - 1), _slots(len(self.table))
        other.quick[:], other.table[:] = self.quick, self.table
        other.arena, other.ids_arena, other.state = self.arena.copy(), self.ids_arena.copy(), self.state.copy()
        other.state[OUTPUT_USED] = 0
        return other

    @property
    def _tables(self) -> tuple[np.ndarray, ...]:
        return self.quick, self.table, self.arena, self.ids_arena, self.state

    @property
    def _merging(self) -> tuple[np.ndarray, ...]:
        return self.vocab.merge_table, self.vocab.byte_ids, self.vocab.byte_merges, *self.merging

    def _put_known_words(self, known: FrequentWords, number: int) -> None:
        """The most frequent ones first; the table must have room."""
        starts = _starts(np.frombuffer(known.lengths, np.uint8, number))
        id_starts = _starts(np.frombuffer(known.id_counts, np.uint8, number))
        words = np.frombuffer(known.text[: starts[-1]] + bytes(16), np.uint8)
        ids = np.frombuffer(known.ids, "<u4", id_starts[-1]).astype(np.uint32, copy=False)
        self._grow_arenas(len(words) + len(ids) + number)
        self.kernels.put_words(words, starts, ids, id_starts, *self._tables, self.merging[0], self.vocab.narrow)

    def ids_of_words(self, content: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of words of at most MAX_CACHED_BYTES one after another, and where each word's begin."""
        words = WordCounts.from_dict(dict.fromkeys(content, 1))
        ids, id_starts = np.empty(words.num_bytes, np.uint32), np.empty(len(words) + 1, np.int64)
        used = self.kernels.merge_words(
            words.word_bytes, words.word_starts, self.vocab.merge_table, self.vocab.byte_ids, self.vocab.byte_merges,
            self.state, *self.merging, ids, id_starts,
        )  # fmt: skip
        return ids[:used], id_starts

    def __call__(self, text: memoryview, start: int, stop: int, is_last: bool) -> tuple[int, bool]:
        vocab = self.vocab
        while True:
            start = self._encode_block(
                text, start, stop, is_last, vocab.pattern, *vocab.special_tokens.kernel_arguments, vocab.special_ids,
                self.classes, self.ends, self.scratch, *self._tables, *self._merging, self.output, vocab.narrow,
            )  # fmt: skip
            status, needed = int(self.state[STATUS]), int(self.state[NEEDED])
            if status in (DONE, NOT_UTF8):
                return start, status == NOT_UTF8
            if status == MISSING_BYTE:
                self.state[OUTPUT_USED] = 0
                raise missing_byte(bytes((needed,)))
            self._make_room(status, needed)

    def _make_room(self, status: int, needed: int) -> None:
        if status == NEEDS_OUTPUT:
            output = np.empty(2 * len(self.output) + needed, np.uint8)
            output[: len(self.output)] = self.output
            self.output = output
        elif status == NEEDS_SCRATCH:
            self._make_scratch(2 * needed)
        elif status == NEEDS_TABLE:
            if not self._grow_table(needed):
                self._clear()
        elif status == NEEDS_ARENA:
            if len(self.arena) > ARENA_BYTES_PER_SLOT * self.max_slots:
                self._clear()
            else:
                self._grow_arenas(needed)

    def _grow_table(self, words: int) -> bool:
        slots = len(self.table)
        while (int(self.state[UNIQUE]) + words) * MAX_LOAD_DENOMINATOR > slots * MAX_LOAD_NUMERATOR:
            slots *= 2
        if slots > self.max_slots:
            return False
        if slots > len(self.table):
            larger = _slots(slots)
            self.kernels.move_table(self.table, larger)
            self.table = larger
        return True

    def _grow_arenas(self, num_bytes: int) -> None:
        size = 2 * len(self.arena) + num_bytes + 8
        arena, ids_arena = np.empty(size, np.uint8), np.empty(size, np.int32)
        arena[: len(self.arena)], ids_arena[: len(self.ids_arena)] = self.arena, self.ids_arena
        self.arena, self.ids_arena = arena, ids_arena

    def forget(self, array: np.ndarray | memoryview) -> None:
        """Memory that is not needed any more: hold on to it no longer."""
        self._encode_block.forget(array)

    def take(self) -> np.ndarray:
        """The ids that were written to `output` since the last call; they stay there until the next ones are."""
        used = int(self.state[OUTPUT_USED]) * self.vocab.dtype.itemsize
        self.state[OUTPUT_USED] = 0
        return self.output[:used].view(self.vocab.dtype)
