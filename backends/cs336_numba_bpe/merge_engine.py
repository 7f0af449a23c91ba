"""Driving the compiled merge loop: sizes its arrays, grows them between merges, hands out merges as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cs336_registry.text.vocab_files import BYTES_IN_CHARACTER_ORDER

from .compile_cache import load_kernels
from .count_table import WordCounts
from .merge_state import (
    ARENA_USED,
    FINISHED,
    HEAP_SIZE,
    LENGTH,
    MERGES_DONE,
    NARROW_SYMBOLS,
    NARROW_TOKENS,
    NEEDED,
    NEEDS_GROWTH,
    NUM_ROWS,
    NUM_TOKENS,
    PAIR_KEYS_USED,
    STATE_LENGTH,
    THRESHOLD,
    TOKEN_BYTES_USED,
)

NO_KEY = np.uint64(0xFFFFFFFFFFFFFFFF)
NO_MERGES = np.empty(0, np.int32)

ROW_ARRAYS = ("row_keys", "row_counts", "row_starts", "row_lengths")
HEAP_ARRAYS = ("heap_counts", "heap_rows")
FOUND_ARRAYS = ("found", "found_left", "found_right")
TOKEN_ARRAYS = (
    "token_starts", "token_lengths", "token_order",
    "left_counts", "right_counts", "left_places", "right_places", "left_tokens", "right_tokens",
)  # fmt: skip
MERGE_ARRAYS = ("merge_left", "merge_right", "merge_count")


class MergeEngine:
    """BPE merges of counted words, in order; `tie_break` is "greatest_bytes" or "smallest_ids".

    wide: places in 64 bits and symbols in 32; by default where the words or the vocabulary demand it.
    Raises OverflowError where a pair count could pass 2**63 - 1.
    """

    def __init__(
        self,
        words: WordCounts,
        max_tokens: int,
        *,
        tie_break: str = "greatest_bytes",
        wide: bool | None = None,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        _check_sum(words)
        num_symbols = words.num_bytes + len(words) + 1
        self.wide = num_symbols >= NARROW_SYMBOLS or max_tokens >= NARROW_TOKENS if wide is None else wide
        self.kernels = load_kernels("merge_wide" if self.wide else "merge", announce=announce)
        self.place_type, self.symbol_type = (np.int64, np.int32) if self.wide else (np.int32, np.uint16)
        self.separator = int(np.iinfo(self.symbol_type).max)
        self.order_by_bytes = tie_break == "greatest_bytes"
        self.state = np.zeros(STATE_LENGTH, np.int64)
        self._lay_out(words, num_symbols)
        self._make_tokens(max(256, max_tokens))
        self._make_rows()

    def _lay_out(self, words: WordCounts, num_symbols: int) -> None:
        self.symbols = np.empty(num_symbols, self.symbol_type)
        self.word_ids = np.empty(num_symbols, np.int32)
        self.word_counts = np.empty(len(words), np.int64)
        used = self.kernels.lay_out_words(
            words.word_bytes, words.word_starts, words.counts,
            self.symbols, self.word_ids, self.word_counts, self.separator,
        )  # fmt: skip
        self.symbols, self.word_ids = self.symbols[:used], self.word_ids[:used]

    def _make_tokens(self, max_tokens: int) -> None:
        capacity = max_tokens + 2
        self.token_bytes = np.zeros(1 << 16, np.uint8)
        self.token_bytes[:256] = np.arange(256)
        self.token_starts, self.token_lengths = np.zeros(capacity, np.int64), np.zeros(capacity, np.int64)
        self.token_starts[:256], self.token_lengths[:256] = np.arange(256), 1
        self.token_order = np.zeros(capacity, np.uint64)
        if self.order_by_bytes:
            self.token_order[:256] = np.arange(256, dtype=np.uint64) << np.uint64(56)
        else:
            rank = np.empty(256, np.uint64)
            rank[list(BYTES_IN_CHARACTER_ORDER)] = np.arange(256)
            self.token_order[:256] = ~rank
        for name in ("left_counts", "right_counts", "left_places", "right_places"):
            setattr(self, name, np.zeros(capacity, np.int64))
        self.left_tokens, self.right_tokens = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
        self.merge_left, self.merge_right = np.empty(capacity, np.int32), np.empty(capacity, np.int32)
        self.merge_count = np.empty(capacity, np.int64)
        self.state[NUM_TOKENS] = self.state[TOKEN_BYTES_USED] = 256

    def _make_rows(self) -> None:
        pair_counts, pair_places = np.zeros(65536, np.int64), np.zeros(65536, np.int64)
        self.kernels.count_byte_pairs(self.symbols, self.word_ids, self.word_counts, pair_counts, pair_places)
        num_places = int(pair_places.sum())
        self.arena = np.empty(3 * num_places + (1 << 16), self.place_type)
        self.row_keys, self.row_counts = np.empty(1 << 17, np.uint64), np.empty(1 << 17, np.int64)
        self.row_starts, self.row_lengths = np.empty(1 << 17, np.int64), np.empty(1 << 17, np.int64)
        self.pair_keys, self.pair_rows = np.full(1 << 18, NO_KEY, np.uint64), np.empty(1 << 18, np.int32)
        self.heap_counts, self.heap_rows = np.empty(1 << 16, np.int64), np.empty(1 << 16, np.int32)
        self.found = np.empty(1 << 14, self.place_type)
        self.found_left, self.found_right = np.empty(1 << 14, np.int32), np.empty(1 << 14, np.int32)
        self.kernels.list_byte_pairs(
            self.symbols, pair_counts, pair_places, np.empty(65536, np.int64), self.arena, self.row_keys,
            self.row_counts, self.row_starts, self.row_lengths, self.pair_keys, self.pair_rows, self.state,
        )  # fmt: skip
        # No pair is pushed until the first look through all rows sets the threshold.
        self.state[THRESHOLD] = np.iinfo(np.int64).max

    @property
    def merges_done(self) -> int:
        return int(self.state[MERGES_DONE])

    @property
    def num_tokens(self) -> int:
        return int(self.state[NUM_TOKENS])

    def run(self, stop_at: int, forced: tuple[np.ndarray, np.ndarray] = (NO_MERGES, NO_MERGES)) -> bool:
        """Merge until `stop_at` merges are done; False where no pair was left before.

        forced: ids of the first merges' left and right tokens, which are taken as they are.
        """
        while True:
            self._grow(MERGE_ARRAYS, stop_at)
            outcome = self.kernels.merge_pairs(
                stop_at, self.symbols, self.word_ids, self.word_counts, self.arena,
                self.row_keys, self.row_counts, self.row_starts, self.row_lengths,
                self.pair_keys, self.pair_rows, self.heap_counts, self.heap_rows,
                self.token_bytes, self.token_starts, self.token_lengths, self.token_order,
                self.left_counts, self.right_counts, self.left_places, self.right_places,
                self.left_tokens, self.right_tokens, self.found, self.found_left, self.found_right,
                self.merge_left, self.merge_right, self.merge_count, self.state,
                int(self.order_by_bytes), self.separator, *forced,
            )  # fmt: skip
            if outcome != NEEDS_GROWTH:
                return outcome != FINISHED
            self._make_room()

    def _make_room(self) -> None:
        """Enlarge whatever is too small for a merge with state[NEEDED] places."""
        places, state = int(self.state[NEEDED]), self.state
        neighbours = min(2 * places, 2 * int(state[NUM_TOKENS])) + 4
        self._grow(FOUND_ARRAYS, places)
        self._grow(("arena",), int(state[ARENA_USED]) + 2 * places, factor=1.5)
        self._grow(ROW_ARRAYS, int(state[NUM_ROWS]) + neighbours)
        self._grow(HEAP_ARRAYS, max(int(state[HEAP_SIZE]) + neighbours, places + 1024))
        self._grow(("token_bytes",), int(state[TOKEN_BYTES_USED]) + int(state[LENGTH]))
        if 2 * (int(state[PAIR_KEYS_USED]) + neighbours) > len(self.pair_keys):
            size = 2 * len(self.pair_keys)
            while 2 * (int(state[PAIR_KEYS_USED]) + neighbours) > size:
                size *= 2
            keys, rows = np.full(size, NO_KEY, np.uint64), np.empty(size, np.int32)
            self.kernels.move_pairs(self.pair_keys, self.pair_rows, keys, rows)
            self.pair_keys, self.pair_rows = keys, rows

    def _grow(self, names: Sequence[str], wanted: int, *, factor: float = 2.0) -> None:
        if wanted <= len(getattr(self, names[0])):
            return
        size = max(wanted, int(len(getattr(self, names[0])) * factor))
        for name in names:
            array = getattr(self, name)
            larger = np.empty(size, array.dtype)
            larger[: len(array)] = array
            setattr(self, name, larger)

    def replay(self, merges: Sequence[tuple[bytes, bytes]]) -> None:
        """Do again the merges of an earlier run; raises ValueError where these words can't have given them."""
        ids = {bytes((byte,)): byte for byte in range(256)}
        for left, right in merges:
            ids[left + right] = len(ids)
        pairs = [(ids[left], ids[right]) for left, right in merges]
        if pairs:
            self.run(len(pairs), (np.array(pairs, np.int32)[:, 0].copy(), np.array(pairs, np.int32)[:, 1].copy()))
        if self.merges_done != len(pairs):
            raise ValueError(
                f"merge {self.merges_done} of the checkpoint does not occur in the corpus: delete its cache"
            )

    def byte_pair_counts(self) -> dict[tuple[bytes, bytes], int]:
        """The counts of neighbouring bytes; before the first merge, when rows are byte pairs alone."""
        rows = slice(0, int(self.state[NUM_ROWS]))
        keys, counts = self.row_keys[rows].tolist(), self.row_counts[rows].tolist()
        return {(bytes((key >> 32,)), bytes((key & 255,))): count for key, count in zip(keys, counts, strict=True)}

    def pair_count(self, left: bytes, right: bytes) -> int:
        """How often two tokens stand side by side now; 0 for tokens that no merge has made."""
        ids = {token: token_id for token_id, token in enumerate(self.tokens())}
        if left not in ids or right not in ids:
            return 0
        key = np.uint64(ids[left] << 32 | ids[right])
        rows = np.flatnonzero(self.row_keys[: int(self.state[NUM_ROWS])] == key)
        return int(self.row_counts[rows].sum())

    def tokens(self) -> list[bytes]:
        """The bytes of every token: 256 bytes, then new ones in order."""
        content = self.token_bytes.tobytes()
        starts, lengths = self.token_starts.tolist(), self.token_lengths.tolist()
        return [content[starts[token] : starts[token] + lengths[token]] for token in range(self.num_tokens)]

    def merge_rows(self) -> Iterator[tuple[int, int, int]]:
        """(left id, right id, count) of each merge; merge i makes token 256 + i."""
        done = slice(0, self.merges_done)
        columns = (self.merge_left, self.merge_right, self.merge_count)
        return zip(*(column[done].tolist() for column in columns), strict=True)

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merges so far, as bytes."""
        tokens = self.tokens()
        return [(tokens[left], tokens[right]) for left, right, _ in self.merge_rows()]


def _check_sum(words: WordCounts) -> None:
    """No pair can be seen more often than there are bytes in the corpus; that must fit 63 bits."""
    if len(words) == 0:
        return
    if int(words.counts.min()) < 0:
        raise ValueError(f"a word count is {int(words.counts.min())}: counts must not be negative")
    estimate = float(np.dot(words.counts.astype(np.float64), np.diff(words.word_starts).astype(np.float64)))
    if estimate >= 2.0**62:
        lengths = np.diff(words.word_starts).tolist()
        total = sum(count * length for count, length in zip(words.counts.tolist(), lengths, strict=True))
        if total >= 2**63:
            raise OverflowError(
                f"the words have {total} bytes together, and pair counts have 63 bits: use fewer shards"
            )
