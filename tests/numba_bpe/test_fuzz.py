"""A fixed budget of fuzzing in every run; `python -m tests.numba_bpe.fuzzing N` goes on longer."""

from __future__ import annotations

import pytest
from cs336_numba_bpe import tokenizer as tokenizer_module

from .fuzzing import check_counting, check_encoding, check_merging


@pytest.mark.parametrize("first_seed", range(0, 1600, 200))
def test_counting(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 200):
        check_counting(seed)


@pytest.mark.parametrize("first_seed", range(0, 160, 40))
def test_merging(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 40):
        check_merging(seed)


@pytest.mark.parametrize("first_seed", range(0, 160, 40))
def test_encoding(first_seed: int, compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "RANGE_BYTES", 40)
    for seed in range(first_seed, first_seed + 40):
        check_encoding(seed)
