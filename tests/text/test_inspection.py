"""A sample is as long as it was asked for."""

from __future__ import annotations

import pytest

from cs336_registry.text import inspection


class Bytes:
    def encode(self, text):
        return list(text.encode())


@pytest.mark.parametrize("text", ["some words " * 110_000, "some words\n" * 110_000, "日" * 400_000, "é\n\n" * 300_000])
@pytest.mark.parametrize("limit", [1, 1000, 1_100_001])
def test_a_sample_is_cut_at_the_character_that_ends_it(tmp_path, monkeypatch, text, limit):
    monkeypatch.setattr(inspection, "WARM_UP_BYTES", 0)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    blocks = list(inspection._texts(str(tmp_path / "a.txt"), limit))
    sampled = "".join(blocks)
    assert text.startswith(sampled)
    assert 0 <= limit - len(sampled.encode()) < 3 or len(sampled) == 1
    assert all(block.endswith("\n") for block in blocks[:-1])
    assert inspection.encoded(Bytes(), str(tmp_path / "a.txt"), limit).bytes == len(sampled.encode())


def test_a_sample_goes_through_several_texts_and_ends_with_the_last(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two\\nthree"}\n{"text": "four"}\n')
    assert list(inspection._texts(str(tmp_path / "a.jsonl"), 7)) == ["one", "two\n"]
    assert list(inspection._texts(str(tmp_path / "a.jsonl"), 100)) == ["one", "two\n", "three", "four"]
