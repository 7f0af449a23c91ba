"""The compiled way, or the plain one, forced where a test asks."""

from __future__ import annotations

import pytest
from cs336_numba_bpe import corpus


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No input is small: everything runs compiled."""
    monkeypatch.setattr(corpus, "WARM_BYTES", 0)
    monkeypatch.setattr(corpus, "COLD_BYTES", 0)


@pytest.fixture
def plain_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input is small: nothing runs compiled."""
    monkeypatch.setattr(corpus, "WARM_BYTES", 1 << 60)
