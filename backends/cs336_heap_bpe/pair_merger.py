"""The merge loop: a heap of upper bounds over pairs, with the places of each pair in the layout of all words.

All places of a pair appear in the step that makes its newer token; later steps only take some away. So a count in the
heap is an upper bound: the popped pair is counted again among its places and pushed back if it has lost some. No count
is ever adjusted in between. (No token is ever made by two pairs: inside a token's bytes every earlier merge fell the
same way, whatever stands around them, or the token could not have come about.)

Only pairs counted at least `threshold` times are kept; when the heap runs dry the threshold falls and the words are
scanned for pairs again. Counts and sums are 64-bit integers. After the first thousands of merges most pairs have a
handful of places, for which forty calls of numpy would take ten times as long as a loop: up to `FEW` go one by one.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from cs336_registry.components.bpe_trainer import TieBreak
from cs336_registry.text.training_cache import WordCounts
from cs336_registry.text.vocab_files import BYTES_IN_CHARACTER_ORDER, Merges

from .word_layout import WordLayout

Pair = tuple[int, int]
"""Two token ids of this module: a byte is its own id, new tokens follow from 256 on."""

FEW = 48
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
        self.layout = WordLayout(words)
        self.places: dict[Pair, np.ndarray | list[int]] = {}
        self.heap: list[tuple] = []
        self.threshold = 0
        self.wanted: set[Pair] | None = None

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
        if isinstance(places, list):
            if left == right:
                places = _every_other_of_few(places, len(left_bytes))
            self.layout.join_few(places, len(left_bytes), len(right_bytes), token)
            self._index_few(token, places)
        else:
            if left == right:
                places = places[_every_other(places, len(left_bytes))]
            self.layout.join(places, len(left_bytes), len(right_bytes), token)
            self._index_neighbours(token, places)
        return left_bytes, right_bytes

    def byte_pair_counts(self) -> dict[tuple[bytes, bytes], int]:
        """The counts of neighbouring bytes, before any merge."""
        sums = np.zeros(1 << 16, np.int64)
        for places, keys in self.layout.pairs(256):
            sums += self.layout.sums(keys, places, len(sums))
        return {(bytes((key >> 8,)), bytes((key & 255,))): int(sums[key]) for key in np.flatnonzero(sums).tolist()}

    def _token(self, token: bytes) -> int:
        """The id of `token`, given now if it is new."""
        token_id = self.id_of.get(token)
        if token_id is None:
            token_id = self.id_of[token] = len(self.tokens)
            self.tokens.append(token)
            self.keys.append(self._inverted(token) if self.tie_break == "greatest_bytes" else token_id)
            self.layout.add_token(token_id, len(token))
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
        length, layout = len(self.tokens[left]), self.layout
        if len(places) > FEW:
            valid = (layout.ids[places] == left) & (layout.ids[places + length] == right)
            if not valid.all():
                places = self.places[pair] = places[valid]
            return int(layout.weight[places].sum(dtype=np.int64))
        few = places if isinstance(places, list) else places.tolist()
        ids, weights = layout.cells, layout.weights
        few = self.places[pair] = [place for place in few if ids[place] == left and ids[place + length] == right]
        return sum([weights[place] for place in few])

    def _index_few(self, token: int, places: Sequence[int]) -> None:
        """`_index_neighbours` for few places."""
        ids, weights, length = self.layout.cells, self.layout.weights, len(self.tokens[token])
        found: defaultdict[Pair, list[int]] = defaultdict(list)
        for place in places:
            after, before = ids[place + length], ids[place - 1]
            if after >= 0:
                found[token, after].append(place)
            if before >= 0 and before != token:
                found[before, token].append(place - len(self.tokens[before]))
        for pair, few in found.items():
            if self.wanted is None:
                count = sum([weights[place] for place in few])
                if count >= self.threshold:
                    self._keep(pair, few, count)
            else:
                self._keep(pair, few, 0)

    def _index_neighbours(self, token: int, places: np.ndarray) -> None:
        """Index the pairs of `token`, which stands at `places` (ascending), with its neighbours on both sides."""
        ids, weight = self.layout.ids, self.layout.weight[places]
        after = ids[places + len(self.tokens[token])]
        inside = after >= 0
        self._index_groups(after[inside], places[inside], weight[inside], token, token_is_left=True)
        before = ids[places - 1]
        # Two of the new tokens side by side have been indexed above, as the pair of the left one.
        inside = (before >= 0) & (before != token)
        before, places = before[inside], places[inside]
        places = places - self.layout.lengths_of(before)
        self._index_groups(before, places, weight[inside], token, token_is_left=False)

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

    def _keep(self, pair: Pair, places: np.ndarray | list[int], count: int) -> None:
        if self.wanted is None:
            self.places[pair] = places
            self._push(pair, count)
        elif pair in self.wanted:
            self.places[pair] = places

    def _lower_threshold(self) -> None:
        if self.threshold:
            self.threshold = max(1, self.threshold // LATER_THRESHOLD_DIVISOR)
        else:
            self.threshold = max(1, int(self.layout.bucket_sums(len(self.tokens)).max()) // FIRST_THRESHOLD_DIVISOR)

    def _scan(self) -> None:
        """Index, in the words as they are now, the pairs that reach the threshold or that are wanted."""
        self.places.clear()
        self.heap.clear()
        layout, vocab_size = self.layout, len(self.tokens)
        if self.wanted is None:
            # A bucket below the threshold has no pair that reaches it.
            passing = layout.bucket_sums(vocab_size) >= self.threshold
            is_kept = lambda keys: passing[keys % layout.buckets]  # noqa: E731
        else:
            wanted = np.array([left * vocab_size + right for left, right in self.wanted], np.int64)
            is_kept = lambda keys: np.isin(keys, wanted)  # noqa: E731
        kept = [
            (places[chosen], keys[chosen]) for places, keys in layout.pairs(vocab_size) for chosen in [is_kept(keys)]
        ]
        places = np.concatenate([block for block, _ in kept])
        keys = np.concatenate([block for _, block in kept])
        del kept
        if not len(keys):
            return
        order = keys.argsort(kind="stable")
        keys, places = keys[order], places[order]
        starts = np.concatenate(([0], np.flatnonzero(keys[1:] != keys[:-1]) + 1))
        counts = np.add.reduceat(layout.weight[places], starts, dtype=np.int64)
        ends = np.concatenate((starts[1:], [len(keys)]))
        groups = zip(keys[starts].tolist(), starts.tolist(), ends.tolist(), counts.tolist(), strict=True)
        for key, start, end, count in groups:
            if count >= self.threshold:
                self._keep(divmod(key, vocab_size), places[start:end].copy(), count)


def _every_other(places: np.ndarray, step: int) -> np.ndarray:
    """Which of ascending `places` stay when a merge of a token with itself goes from left to right.

    In a run of places `step` apart each shares a token with the next: the first, third, fifth ... stay.
    """
    position = np.arange(len(places))
    is_first = np.ones(len(places), bool)
    is_first[1:] = places[1:] - places[:-1] != step
    first = np.maximum.accumulate(np.where(is_first, position, 0))
    return (position - first) % 2 == 0


def _every_other_of_few(places: Sequence[int], step: int) -> list[int]:
    kept: list[int] = []
    for place in places:
        if not kept or place != kept[-1] + step:
            kept.append(place)
    return kept
