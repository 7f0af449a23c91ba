"""Driving the compiled merge loop: sizes its arrays, grows them between merges, hands out merges as they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from cs336_registry.text.vocab_files import BYTES_IN_CHARACTER_ORDER

from . import blocks
from .compile_cache import load_kernels
from .count_table import WordCounts
from .merge_state import (
    ARENA_USED,
    BLOCK,
    BLOCK_SHIFT,
    FINISHED,
    FLOOR,
    HEAP_SIZE,
    HIGHEST,
    LENGTH,
    MERGES_DONE,
    NARROW_SYMBOLS,
    NARROW_TOKENS,
    NEEDED,
    NEEDS_GROWTH,
    NEGATIVE_COUNT,
    NUM_ROWS,
    NUM_TOKENS,
    PAIR_KEYS_USED,
    STATE_LENGTH,
    THRESHOLD,
    TOKEN_BYTES_USED,
    TOO_MANY_BYTES,
    TOP_CLASS,
)

NO_MERGES = blocks.of("i", ())

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
    all_pairs: keep count of pairs that are too rare to be merged, too.
    Raises OverflowError where a pair count could pass 2**63 - 1.
    """

    def __init__(
        self,
        words: WordCounts,
        max_tokens: int,
        *,
        tie_break: str = "greatest_bytes",
        wide: bool | None = None,
        all_pairs: bool = False,
        announce: Callable[[str], None] | None = None,
    ) -> None:
        # Each merge leaves fewer symbols.
        self.most_merges = max(0, min(max_tokens - 256, words.num_bytes))
        max_tokens = 256 + self.most_merges
        class_words, class_symbols = blocks.zeros("q", TOP_CLASS + 1), blocks.zeros("q", TOP_CLASS + 1)
        _measure(words, class_words, class_symbols)
        sizes = [-(-symbols // BLOCK) * BLOCK for symbols in class_symbols]
        num_symbols = BLOCK + sum(sizes)
        self.wide = num_symbols >= NARROW_SYMBOLS or max_tokens >= NARROW_TOKENS if wide is None else wide
        self.kernels = load_kernels("merge_wide" if self.wide else "merge", announce=announce)
        self.place_kind, self.symbol_kind = ("q", "i") if self.wide else ("i", "H")
        self.separator = max_tokens + 1
        self.order_by_bytes = tie_break == "greatest_bytes"
        self.state = blocks.zeros("q", STATE_LENGTH)
        if not all_pairs:
            # As many words as there will be merges occur at least so often.
            words_from = itertools.accumulate(reversed(class_words))
            self.state[FLOOR] = max(1, sum(number >= self.most_merges for number in words_from) - 1)
        self._make_tokens(max_tokens)
        self._lay_out(words, sizes)
        self._make_rows()

    def _lay_out(self, words: WordCounts, sizes: Sequence[int]) -> None:
        """Write the words as symbols, those of the highest class first, and add up the byte pairs."""
        stops = list(itertools.accumulate(reversed(sizes), initial=BLOCK))[::-1]
        self.symbols = blocks.zeros(self.symbol_kind, stops[0])
        self.block_counts = blocks.zeros("q", stops[0] >> BLOCK_SHIFT)
        self.pair_counts, self.pair_places = blocks.zeros("q", 65536), blocks.zeros("q", 65536)
        self.kernels.lay_out_words(
            words.word_bytes, words.word_starts, words.counts, blocks.of("q", stops[1:]),
            self.symbols, self.block_counts, self.pair_counts, self.pair_places, self.separator,
        )  # fmt: skip

    def _make_tokens(self, max_tokens: int) -> None:
        capacity = max_tokens + 2
        self.token_bytes = blocks.zeros("B", 1 << 16)
        self.token_bytes[:256] = bytes(range(256))
        for name in TOKEN_ARRAYS[2:]:
            setattr(self, name, blocks.zeros("i" if name.endswith("_tokens") else "q", capacity))
        self.token_starts, self.token_lengths = blocks.zeros("q", capacity), blocks.zeros("q", capacity)
        self.token_order = blocks.zeros("Q", capacity)
        self.token_starts[:256], self.token_lengths[:256] = blocks.of("q", range(256)), blocks.of("q", [1] * 256)
        for rank, byte in enumerate(range(256) if self.order_by_bytes else BYTES_IN_CHARACTER_ORDER):
            self.token_order[byte] = rank << 56 if self.order_by_bytes else (1 << 64) - 1 - rank
        self.merge_left, self.merge_right = blocks.zeros("i", capacity), blocks.zeros("i", capacity)
        self.merge_count = blocks.zeros("q", capacity)
        self.state[NUM_TOKENS] = self.state[TOKEN_BYTES_USED] = 256

    def _make_rows(self) -> None:
        self.arena = blocks.zeros(self.place_kind, 3 * sum(self.pair_places) + (1 << 16))
        self.row_keys, self.row_counts = blocks.zeros("Q", 1 << 17), blocks.zeros("q", 1 << 17)
        self.row_starts, self.row_lengths = blocks.zeros("q", 1 << 17), blocks.zeros("q", 1 << 17)
        self.pair_keys, self.pair_rows = _no_keys(1 << 18), blocks.zeros("i", 1 << 18)
        self.heap_counts, self.heap_rows = blocks.zeros("q", 1 << 16), blocks.zeros("i", 1 << 16)
        self.found = blocks.zeros(self.place_kind, 1 << 14)
        self.found_left, self.found_right = blocks.zeros("i", 1 << 14), blocks.zeros("i", 1 << 14)
        self.kernels.list_byte_pairs(
            self.symbols, self.pair_counts, self.pair_places, blocks.zeros("q", 65536), self.arena, self.row_keys,
            self.row_counts, self.row_starts, self.row_lengths, self.pair_keys, self.pair_rows, self.state,
        )  # fmt: skip
        # No pair is pushed until the first look through all rows sets the threshold.
        self.state[THRESHOLD] = HIGHEST

    @property
    def merges_done(self) -> int:
        return self.state[MERGES_DONE]

    @property
    def num_tokens(self) -> int:
        return self.state[NUM_TOKENS]

    def run(self, stop_at: int, forced: tuple[memoryview, memoryview] = (NO_MERGES, NO_MERGES)) -> bool:
        """Merge until `stop_at` merges are done; False where no pair was left before.

        forced: ids of the first merges' left and right tokens, which are taken as they are.
        """
        stop_at = min(stop_at, self.most_merges)
        while True:
            self._grow(MERGE_ARRAYS, stop_at)
            outcome = self.kernels.merge_pairs(
                stop_at, self.symbols, self.block_counts, self.arena,
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
        state = self.state
        places = state[NEEDED]
        neighbours = min(2 * places, 2 * state[NUM_TOKENS]) + 4
        self._grow(FOUND_ARRAYS, places)
        self._grow(("arena",), state[ARENA_USED] + 2 * places + len(self.found), factor=1.5)
        self._grow(ROW_ARRAYS, state[NUM_ROWS] + neighbours)
        self._grow(HEAP_ARRAYS, max(state[HEAP_SIZE] + neighbours, places + 1024))
        self._grow(("token_bytes",), state[TOKEN_BYTES_USED] + state[LENGTH])
        if 2 * (state[PAIR_KEYS_USED] + neighbours) > len(self.pair_keys):
            size = 2 * len(self.pair_keys)
            while 2 * (state[PAIR_KEYS_USED] + neighbours) > size:
                size *= 2
            keys, rows = _no_keys(size), blocks.zeros("i", size)
            self.kernels.move_pairs(self.pair_keys, self.pair_rows, keys, rows)
            self.pair_keys, self.pair_rows = keys, rows

    def _grow(self, names: Sequence[str], wanted: int, *, factor: float = 2.0) -> None:
        if wanted <= len(getattr(self, names[0])):
            return
        size = max(wanted, int(len(getattr(self, names[0])) * factor))
        for name in names:
            setattr(self, name, blocks.grown(getattr(self, name), size))

    def replay(self, merges: Sequence[tuple[bytes, bytes]]) -> None:
        """Do again the merges of an earlier run; raises ValueError where these words can't have given them."""
        ids = {bytes((byte,)): byte for byte in range(256)}
        for left, right in merges:
            ids[left + right] = len(ids)
        lefts, rights = (blocks.of("i", (ids[merge[side]] for merge in merges)) for side in (0, 1))
        if merges:
            self.run(len(merges), (lefts, rights))
        if self.merges_done != len(merges):
            raise ValueError(
                f"merge {self.merges_done} of the checkpoint does not occur in the corpus: delete its cache"
            )

    def byte_pair_counts(self) -> dict[tuple[bytes, bytes], int]:
        """The counts of neighbouring bytes in the words, before any merge."""
        return {
            (bytes((pair >> 8,)), bytes((pair & 255,))): self.pair_counts[pair]
            for pair in range(65536)
            if self.pair_places[pair]
        }

    def pair_count(self, left: bytes, right: bytes) -> int:
        """How often two tokens stand side by side now; 0 for tokens that no merge has made. Takes `all_pairs`."""
        ids = {token: token_id for token_id, token in enumerate(self.tokens())}
        if left not in ids or right not in ids:
            return 0
        key = ids[left] << 32 | ids[right]
        keys = self.row_keys[: self.state[NUM_ROWS]].tolist()
        return self.row_counts[keys.index(key)] if key in keys else 0

    def tokens(self) -> list[bytes]:
        """The bytes of every token: 256 bytes, then new ones in order."""
        content = self.token_bytes.tobytes()
        starts, lengths = (array[: self.num_tokens].tolist() for array in (self.token_starts, self.token_lengths))
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


def _no_keys(size: int) -> memoryview:
    keys = blocks.zeros("Q", size)
    keys.cast("B")[:] = b"\xff" * keys.nbytes
    return keys


def _measure(words: WordCounts, class_words: memoryview, class_symbols: memoryview) -> None:
    """The words of each class of counts, and their symbols.

    No pair can be seen more often than there are bytes in the corpus; that must fit 63 bits.
    """
    outcome = load_kernels("count").measure_words(words.word_starts, words.counts, class_words, class_symbols)
    if outcome == NEGATIVE_COUNT:
        raise ValueError(f"a word count is {min(words.counts)}: counts must not be negative")
    if outcome == TOO_MANY_BYTES:
        lengths = (stop - start for start, stop in itertools.pairwise(words.word_starts.tolist()))
        total = sum(count * length for count, length in zip(words.counts.tolist(), lengths, strict=True))
        raise OverflowError(f"the words have {total} bytes together, and pair counts have 63 bits: use fewer shards")
