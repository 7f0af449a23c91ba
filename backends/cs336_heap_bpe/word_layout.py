"""All words in flat arrays, where a pair is a place: what the merge loop reads and writes.

Every distinct pretoken is written once into `ids`, a position a byte, with a separator between words. A token keeps
its id on its first and on its last byte, so both neighbours of a place are one look-up away, and joining two tokens
writes a few cells. numpy joins many places in a few calls; few places, which most merges have, are sooner joined one
by one through memoryviews, whose elements are Python's own integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cs336_registry.text.training_cache import WordCounts

SEPARATOR = -1
INSIDE = -2
SCAN_BLOCK = 1 << 21
MOST_BUCKETS = 1 << 22
EXACT_IN_FLOAT = 1 << 53


class WordLayout:
    """The words of one training, a token a byte at first. `weight` is the word's count at each of its positions."""

    def __init__(self, words: WordCounts) -> None:
        lengths = words.lengths.astype(np.int64)
        size = 1 + int(lengths.sum()) + len(lengths)
        self.ids = np.full(size, SEPARATOR, np.int32)
        is_byte = np.ones(size, bool)
        is_byte[0] = False
        is_byte[np.cumsum(lengths + 1)] = False
        self.ids[is_byte] = np.frombuffer(words.text, np.uint8)
        self.is_start = is_byte
        largest = int(words.counts.max(initial=0))
        counts = words.counts.astype(np.int32 if largest < 2**31 else np.int64)
        self.weight = np.zeros(size, counts.dtype)
        self.weight[1:] = np.repeat(counts, lengths + 1)
        self.cells, self.starts, self.weights = memoryview(self.ids), memoryview(self.is_start), memoryview(self.weight)
        # Sums of float64 (numpy's bincount) are exact below 2**53 and several times as fast as integer scatters.
        self._sums_fit_float = float(np.dot(words.counts.astype(np.float64), lengths)) < EXACT_IN_FLOAT
        self.buckets = min(MOST_BUCKETS, size)
        self._position_type = np.int32 if size < 2**31 else np.int64
        self._token_length = np.ones(1024, np.int32)

    def add_token(self, token_id: int, length: int) -> None:
        if token_id == len(self._token_length):
            self._token_length = np.concatenate([self._token_length, np.zeros_like(self._token_length)])
        self._token_length[token_id] = length

    def lengths_of(self, ids: np.ndarray) -> np.ndarray:
        """The tokens' lengths (bytes)."""
        return self._token_length[ids]

    def join(self, places: np.ndarray, left_length: int, right_length: int, token: int) -> None:
        """Make one token of the two at each place."""
        seam, ids = places + left_length, self.ids
        self.is_start[seam] = False
        ids[seam] = INSIDE
        ids[seam - 1] = INSIDE
        ids[places] = token
        ids[seam + (right_length - 1)] = token

    def join_few(self, places: Sequence[int], left_length: int, right_length: int, token: int) -> None:
        ids, is_start = self.cells, self.starts
        for place in places:
            seam = place + left_length
            is_start[seam] = False
            ids[seam] = ids[seam - 1] = INSIDE
            ids[place] = ids[seam + right_length - 1] = token

    def pairs(self, vocab_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every place with a right neighbour and the key of the pair there, a block of positions at a time."""
        for block in range(0, len(self.ids), SCAN_BLOCK):
            places = np.flatnonzero(self.is_start[block : block + SCAN_BLOCK]) + block
            left = self.ids[places]
            right = self.ids[places + self._token_length[left]]
            inside = right >= 0
            keys = left[inside].astype(np.int64) * vocab_size + right[inside]
            yield places[inside].astype(self._position_type), keys

    def bucket_sums(self, vocab_size: int) -> np.ndarray:
        """The counts of all pairs, several to a bucket: bounds from above."""
        sums = np.zeros(self.buckets, np.int64)
        for places, keys in self.pairs(vocab_size):
            sums += self.sums(keys % self.buckets, places, self.buckets)
        return sums

    def sums(self, index: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
        """The total weight of the places at each index, exactly."""
        if self._sums_fit_float:
            return np.bincount(index, self.weight[places], size).astype(np.int64)
        sums = np.zeros(size, np.int64)
        np.add.at(sums, index, self.weight[places].astype(np.int64))
        return sums
