"""The merge loop: a heap of upper bounds over pairs, with the places of each pair in one flat array of all words.

Every distinct pretoken is written once into `ids`, a position a byte, with a separator between words. A token keeps
its id on its first and on its last byte, so both neighbours of a place are one look-up away, and merging two tokens
writes a few cells. All places of a pair appear in the step that makes its newer token; later steps only take some away.
So a count in the heap is an upper bound: the popped pair is counted again among its places and pushed back if it has
lost some. No count is ever adjusted in between, and numpy does each step's work in a few calls however many places
there are. (No token is ever made by two pairs: inside a token's bytes every earlier merge fell the same way, whatever
stands around them, or the token could not have come about.)

Only pairs counted at least `threshold` times are kept; when the heap runs dry the threshold falls and the words are
scanned for pairs again. Counts and sums are 64-bit integers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

from cs336_registry.components.bpe_trainer import TieBreak
from cs336_registry.text.training_cache import WordCounts
from cs336_registry.text.vocab_files import BYTES_IN_CHARACTER_ORDER, Merges

Pair = tuple[int, int]
"""Two token ids of this module: a byte is its own id, new tokens follow from 256 on."""

SEPARATOR = -1
INSIDE = -2
SCAN_BLOCK = 1 << 21
MOST_BUCKETS = 1 << 22
EXACT_IN_FLOAT = 1 << 53
FIRST_THRESHOLD_DIVISOR = 64
LATER_THRESHOLD_DIVISOR = 6

_INVERTED = [chr(255 - byte) for byte in range(256)]
_AFTER_EVERY_BYTE = "\u0100"


BASE_BYTES = 56 << 20
"""What the process holds without words: the interpreter, numpy, regex."""
BYTES_PER_SYMBOL = 55
"""Of the merge loop, at its highest, when the words are scanned for pairs (48 on mixed text)."""


def merging_bytes(number: int, num_bytes: int) -> int:
    """An estimate of the process's memory while it merges so many unique pretokens of so many bytes together."""
    return BASE_BYTES + num_bytes + 12 * number + BYTES_PER_SYMBOL * (num_bytes + number + 1)


class PairMerger:
    """Merges the most frequent pair of the words, again and again."""

    def __init__(self, words: WordCounts, tie_break: TieBreak) -> None:
        self.tie_break = tie_break
        self.tokens = [bytes((byte,)) for byte in range(256)]
        self.id_of = {token: token_id for token_id, token in enumerate(self.tokens)}
        number = {byte: position for position, byte in enumerate(BYTES_IN_CHARACTER_ORDER)}
        # heapq pops the smallest: keys order the tokens so that the pair to prefer has the smallest keys.
        self.keys = [
            self._inverted(token) if tie_break == "greatest_bytes" else number[token[0]] for token in self.tokens
        ]
        self.token_length = np.ones(1024, np.int32)
        self._lay_out(words)
        self.places: dict[Pair, np.ndarray] = {}
        self.heap: list[tuple] = []
        self.threshold = 0
        self.wanted: set[Pair] | None = None

    def _lay_out(self, words: WordCounts) -> None:
        """Fill `ids`, `is_start` and `weight` (the word's count at each of its positions)."""
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
        # Sums of float64 (numpy's bincount) are exact below 2**53 and several times as fast as integer scatters.
        self.sums_fit_float = float(np.dot(words.counts.astype(np.float64), lengths)) < EXACT_IN_FLOAT
        self.buckets = min(MOST_BUCKETS, size)
        self.position_type = np.int32 if size < 2**31 else np.int64

    def replay(self, merges: Merges) -> None:
        """Apply merges that are known already; raises LookupError for one that these words do not have."""
        pairs = []
        for left, right in merges:
            if left not in self.id_of or right not in self.id_of:
                raise LookupError(f"no token {left!r} or {right!r} before their merge")
            pairs.append((self.id_of[left], self.id_of[right]))
            self._token(left + right)
        self.wanted = set(pairs)
        self._scan()
        for pair, (left, right) in zip(pairs, merges, strict=True):
            if pair not in self.places:
                raise LookupError(f"the pair {left!r}, {right!r} does not occur")
            self._recount(pair)
            self.merge(pair)
        self.wanted = None
        self.places.clear()

    def next_pair(self) -> tuple[Pair, int] | None:
        """The pair to merge next and its count, or None when no pair is left."""
        while True:
            while self.heap:
                negative, _, _, left, right = heapq.heappop(self.heap)
                count = self._recount((left, right))
                if count == -negative:
                    return (left, right), count
                if count >= self.threshold:
                    self._push((left, right), count)
                else:
                    self.places.pop((left, right), None)
            if self.threshold == 1:
                return None
            self._lower_threshold()
            self._scan()

    def merge(self, pair: Pair) -> tuple[bytes, bytes]:
        """Join `pair`, just counted by `next_pair`, wherever it stands, and index the pairs that come of it."""
        left, right = pair
        places = self.places.pop(pair)
        left_bytes, right_bytes = self.tokens[left], self.tokens[right]
        token = self._token(left_bytes + right_bytes)
        if left == right:
            places = places[_every_other(places, len(left_bytes))]
        seam = places + len(left_bytes)
        ids = self.ids
        self.is_start[seam] = False
        ids[seam] = INSIDE
        ids[seam - 1] = INSIDE
        ids[places] = token
        ids[seam + (len(right_bytes) - 1)] = token
        self._index_neighbours(token, places)
        return left_bytes, right_bytes

    def byte_pair_counts(self) -> dict[tuple[bytes, bytes], int]:
        """The counts of neighbouring bytes, before any merge."""
        sums = np.zeros(1 << 16, np.int64)
        for places, keys in self._neighbours():
            sums += self._sums(keys, self.weight[places], len(sums))
        return {(bytes((key >> 8,)), bytes((key & 255,))): int(sums[key]) for key in np.flatnonzero(sums).tolist()}

    def _token(self, token: bytes) -> int:
        """The id of `token`, given now if it is new."""
        token_id = self.id_of.get(token)
        if token_id is None:
            token_id = self.id_of[token] = len(self.tokens)
            self.tokens.append(token)
            self.keys.append(self._inverted(token) if self.tie_break == "greatest_bytes" else token_id)
            if token_id == len(self.token_length):
                self.token_length = np.concatenate([self.token_length, np.zeros_like(self.token_length)])
            self.token_length[token_id] = len(token)
        return token_id

    @staticmethod
    def _inverted(token: bytes) -> str:
        """A key whose order is the reverse of the tokens': each byte from above, and the end after every byte."""
        return "".join([_INVERTED[byte] for byte in token]) + _AFTER_EVERY_BYTE

    def _push(self, pair: Pair, count: int) -> None:
        left, right = pair
        heapq.heappush(self.heap, (-count, self.keys[left], self.keys[right], left, right))

    def _recount(self, pair: Pair) -> int:
        """The pair's count now; places that other merges took are forgotten."""
        places = self.places.get(pair)
        if places is None:
            return 0
        left, right = pair
        valid = (self.ids[places] == left) & (self.ids[places + len(self.tokens[left])] == right)
        if not valid.all():
            places = self.places[pair] = places[valid]
        return int(self.weight[places].sum(dtype=np.int64))

    def _index_neighbours(self, token: int, places: np.ndarray) -> None:
        """Index the pairs of `token`, which stands at `places` (ascending), with its neighbours on both sides."""
        weight = self.weight[places]
        after = self.ids[places + len(self.tokens[token])]
        inside = after >= 0
        self._index_groups(after[inside], places[inside], weight[inside], token, token_is_left=True)
        before = self.ids[places - 1]
        # Two of the new tokens side by side have been indexed above, as the pair of the left one.
        inside = (before >= 0) & (before != token)
        before, places = before[inside], places[inside]
        self._index_groups(before, places - self.token_length[before], weight[inside], token, token_is_left=False)

    def _index_groups(
        self, neighbours: np.ndarray, places: np.ndarray, weight: np.ndarray, token: int, *, token_is_left: bool
    ) -> None:
        """One pair for each distinct neighbour; those below the threshold wait for the next scan."""
        if not len(neighbours):
            return
        order = neighbours.argsort(kind="stable")
        ordered = neighbours[order]
        starts = np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1))
        counts = np.add.reduceat(weight[order], starts, dtype=np.int64)
        ends = np.concatenate((starts[1:], [len(order)]))
        if self.wanted is None:
            chosen = np.flatnonzero(counts >= self.threshold)
            starts, ends, counts = starts[chosen], ends[chosen], counts[chosen]
        groups = zip(ordered[starts].tolist(), starts.tolist(), ends.tolist(), counts.tolist(), strict=True)
        for neighbour, start, end, count in groups:
            pair = (token, neighbour) if token_is_left else (neighbour, token)
            self._keep(pair, places[order[start:end]], count)

    def _keep(self, pair: Pair, places: np.ndarray, count: int) -> None:
        if self.wanted is None:
            self.places[pair] = places
            self._push(pair, count)
        elif pair in self.wanted:
            self.places[pair] = places

    def _lower_threshold(self) -> None:
        if self.threshold:
            self.threshold = max(1, self.threshold // LATER_THRESHOLD_DIVISOR)
        else:
            self.threshold = max(1, int(self._bucket_sums().max()) // FIRST_THRESHOLD_DIVISOR)

    def _bucket_sums(self) -> np.ndarray:
        """The counts of all pairs, several to a bucket: bounds from above."""
        sums = np.zeros(self.buckets, np.int64)
        for places, keys in self._neighbours():
            sums += self._sums(keys % self.buckets, self.weight[places], self.buckets)
        return sums

    def _scan(self) -> None:
        """Index, in the words as they are now, the pairs that reach the threshold or that are wanted."""
        self.places.clear()
        self.heap.clear()
        if self.wanted is None:
            # A bucket below the threshold has no pair that reaches it.
            passing = self._bucket_sums() >= self.threshold
            is_kept = lambda keys: passing[keys % self.buckets]  # noqa: E731
        else:
            wanted = np.array([left * len(self.tokens) + right for left, right in self.wanted], np.int64)
            is_kept = lambda keys: np.isin(keys, wanted)  # noqa: E731
        kept = [(places[chosen], keys[chosen]) for places, keys in self._neighbours() for chosen in [is_kept(keys)]]
        places = np.concatenate([block for block, _ in kept])
        keys = np.concatenate([block for _, block in kept])
        del kept
        if not len(keys):
            return
        order = keys.argsort(kind="stable")
        keys, places = keys[order], places[order]
        starts = np.concatenate(([0], np.flatnonzero(keys[1:] != keys[:-1]) + 1))
        counts = np.add.reduceat(self.weight[places], starts, dtype=np.int64)
        ends = np.concatenate((starts[1:], [len(keys)]))
        vocab_size = len(self.tokens)
        groups = zip(keys[starts].tolist(), starts.tolist(), ends.tolist(), counts.tolist(), strict=True)
        for key, start, end, count in groups:
            if count >= self.threshold:
                self._keep(divmod(key, vocab_size), places[start:end].copy(), count)

    def _neighbours(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every place with a right neighbour and the key of the pair there, a block of positions at a time."""
        vocab_size = len(self.tokens)
        for block in range(0, len(self.ids), SCAN_BLOCK):
            places = np.flatnonzero(self.is_start[block : block + SCAN_BLOCK]) + block
            left = self.ids[places]
            right = self.ids[places + self.token_length[left]]
            inside = right >= 0
            keys = left[inside].astype(np.int64) * vocab_size + right[inside]
            yield places[inside].astype(self.position_type), keys

    def _sums(self, index: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
        """The total weight at each index, exactly."""
        if self.sums_fit_float:
            return np.bincount(index, weight, size).astype(np.int64)
        sums = np.zeros(size, np.int64)
        np.add.at(sums, index, weight.astype(np.int64))
        return sums


def _every_other(places: np.ndarray, step: int) -> np.ndarray:
    """Which of ascending `places` stay when a merge of a token with itself goes from left to right.

    In a run of places `step` apart each shares a token with the next: the first, third, fifth ... stay.
    """
    position = np.arange(len(places))
    is_first = np.ones(len(places), bool)
    is_first[1:] = places[1:] - places[:-1] != step
    first = np.maximum.accumulate(np.where(is_first, position, 0))
    return (position - first) % 2 == 0
