"""A fixed budget of fuzzing in every run; `python -m tests.heap_bpe.fuzzing N` goes on longer."""

from __future__ import annotations

import pytest

from .fuzzing import check_counting, check_encoding, check_merging


@pytest.mark.parametrize("first_seed", range(0, 1200, 300))
def test_counting(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 300):
        check_counting(seed)


@pytest.mark.parametrize("first_seed", range(0, 120, 40))
def test_merging(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 40):
        check_merging(seed)


@pytest.mark.parametrize("first_seed", range(0, 120, 40))
def test_encoding(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 40):
        check_encoding(seed)
