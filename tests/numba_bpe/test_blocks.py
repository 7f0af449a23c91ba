"""Blocks of memory and how kernels take them."""

from __future__ import annotations

import numpy as np
import pytest
from cs336_numba_bpe import blocks
from cs336_numba_bpe.compile_cache import load_kernels


@pytest.mark.parametrize("kind", blocks.DTYPES)
@pytest.mark.parametrize("length", [0, 1, 1000, 1 << 20], ids=["empty", "one", "small", "mapped"])
def test_a_block_is_zeros_of_its_kind(kind: blocks.Kind, length: int) -> None:
    block = blocks.zeros(kind, length)
    assert np.asarray(block).dtype == np.dtype(blocks.DTYPES[kind]) and len(block) == length
    assert not np.asarray(block).any()
    if length:
        block[length - 1] = 7
        assert list(blocks.grown(block, length + 2)[length - 1 :]) == [7, 0, 0]


def test_two_dimensions_are_rows_one_after_another() -> None:
    block = blocks.zeros("Q", 5, 4)
    block[2, 1] = 2**64 - 1
    assert np.asarray(block).shape == (5, 4) and np.asarray(block).ravel()[9] == 2**64 - 1


def test_kernels_refuse_a_block_of_another_kind() -> None:
    right, wrong = blocks.zeros("q", 3), blocks.zeros("i", 3)
    with pytest.raises(TypeError, match="expected a contiguous 1-D int64 array, got 1-D int32"):
        load_kernels("count").measure_words(right, wrong, right, right)
    with pytest.raises(TypeError, match="expected a contiguous 1-D int64 array, got 1-D int64"):
        load_kernels("count").measure_words(right, blocks.zeros("q", 6)[::2], right, right)
