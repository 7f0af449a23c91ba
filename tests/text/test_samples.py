"""Generated text must be the same everywhere and hold what it promises."""

from __future__ import annotations

from cs336_registry.text import samples


def test_the_same_seed_gives_the_same_text():
    assert samples.prose(100, seed=1) == samples.prose(100, seed=1) != samples.prose(100, seed=2)
    assert samples.tricky_bytes(100, seed=1) == samples.tricky_bytes(100, seed=1)


def test_documents_are_told_apart():
    assert samples.prose(100, documents=5).count(samples.END_OF_TEXT) == 4


def test_invalid_utf8_is_invalid():
    for content in samples.INVALID_UTF8:
        assert "\ufffd" in content.decode("utf-8", "replace")
