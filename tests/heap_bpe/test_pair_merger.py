"""The merge engine against the reference, on words chosen to be awkward."""

from __future__ import annotations

import numpy as np
import pytest
from cs336_heap_bpe import pair_merger, word_layout
from cs336_heap_bpe.bpe_trainer import train
from cs336_reference.bpe_trainer import train as reference_train
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_registry.text.training_cache import WordCounts

WORDS = st.one_of(
    *(
        st.text(alphabet, min_size=1, max_size=25).map(lambda word: word.encode("latin-1"))
        for alphabet in ("a", "ab", "abc", "abcdefgh")
    ),
    st.binary(min_size=1, max_size=12),
)
COUNTS = st.sampled_from([1, 1, 2, 3, 1000, 2**31, 2**32 + 1, 2**40])
TIE_BREAKS = ("greatest_bytes", "smallest_ids")


@settings(max_examples=120, deadline=None)
@given(
    counts=st.dictionaries(WORDS, COUNTS, min_size=1, max_size=25),
    merges=st.integers(0, 60),
    tie_break=st.sampled_from(TIE_BREAKS),
    sizes=st.sampled_from([(0, 1, 2, 7, 5), (48, 64, 6, 1 << 12, 1 << 21), (3, 2, 3, 1 << 10, 50)]),
)
def test_merges_are_the_reference_s(counts, merges, tie_break, sizes):
    """Whatever the thresholds, the number of buckets and the size of a block are."""
    with pytest.MonkeyPatch.context() as patch:
        names = ("FEW", "FIRST_THRESHOLD_DIVISOR", "LATER_THRESHOLD_DIVISOR", "MOST_BUCKETS", "SCAN_BLOCK")
        for name, size in zip(names, sizes, strict=True):
            patch.setattr(word_layout if hasattr(word_layout, name) else pair_merger, name, size)
        found = train(WordCounts.of(counts), 257 + merges, ("<|pad|>",), tie_break)
    assert found == reference_train(counts, 257 + merges, ("<|pad|>",), tie_break)


@pytest.mark.parametrize("tie_break", TIE_BREAKS)
@pytest.mark.parametrize("kept", [0, 1, 17, 40])
def test_replayed_merges_lead_to_the_same_state(tie_break, kept):
    counts = {b"low": 5, b"lowest": 2, b"newer": 6, b"wider": 3, b"newest" * 3: 2, b"aaaaaaa": 4}
    _, merges = reference_train(counts, 256 + 40, (), tie_break)
    merger = pair_merger.PairMerger(WordCounts.of(counts), tie_break)
    merger.replay(merges[:kept])
    continued = merges[:kept]
    while (found := merger.next_pair()) is not None:
        continued.append(merger.merge(found[0]))
    assert continued[: len(merges)] == merges


def test_merges_of_other_words_are_refused():
    merger = pair_merger.PairMerger(WordCounts.of({b"abc": 1}), "greatest_bytes")
    with pytest.raises(LookupError, match=r"the pair b'x', b'y' does not occur"):
        merger.replay([(b"a", b"b"), (b"x", b"y")])
    with pytest.raises(LookupError, match=r"no token b'a' or b'bc' before their merge"):
        pair_merger.PairMerger(WordCounts.of({b"abc": 1}), "greatest_bytes").replay([(b"a", b"bc")])


def test_counts_beyond_32_bits_and_beyond_float():
    """One more occurrence decides between counts that 32 bits, and then float64, can't tell apart."""
    for large in (2**32, 2**53, 2**61):
        counts = {b"ab": large, b"cd": large + 1, b"zy": 5}
        _, merges = train(WordCounts.of(counts), 257)
        assert merges == [(b"c", b"d")]


def test_byte_pair_counts():
    merger = pair_merger.PairMerger(WordCounts.of({b"aaa": 2**40, b"ab": 3}), "greatest_bytes")
    assert merger.byte_pair_counts() == {(b"a", b"a"): 2**41, (b"a", b"b"): 3}


def test_every_other_place_of_a_run():
    places = np.array([0, 1, 2, 5, 6, 9, 10, 11, 12])
    assert places[pair_merger._every_other(places, 1)].tolist() == [0, 2, 5, 9, 11]
    assert pair_merger._every_other_of_few(places.tolist(), 1) == [0, 2, 5, 9, 11]


def test_a_merge_that_spells_a_special_token_takes_its_id():
    """Counts may come from elsewhere and hold a special token's bytes: that merge adds no id."""
    vocab, merges = train(WordCounts.of({b"ab": 9, b"cd": 1}), 258, ("ab",))
    assert merges == [(b"a", b"b"), (b"c", b"d")]
    assert vocab[257] == b"cd"
    assert (vocab, merges) == reference_train({b"ab": 9, b"cd": 1}, 258, ("ab",), "greatest_bytes")
