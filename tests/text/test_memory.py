"""Memory ceilings: sizes, and what is said where one can't be kept."""

from __future__ import annotations

import pytest

from cs336_registry.text.memory import bytes_of, readable, refuse_beyond


def test_sizes():
    assert [bytes_of(size) for size in (None, 7, "2GB", "1.5 MiB", "8kb")] == [None, 7, 2 * 10**9, 1_572_864, 8000]


@pytest.mark.parametrize("size", ["much", "", "2 GBs", "-1", "0", "1e9"])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match=r"max_ram is .*: give bytes, or a number with KB"):
        bytes_of(size)


def test_a_refusal_names_a_ceiling_that_is_not_refused():
    with pytest.raises(
        MemoryError, match=r"max_ram is 1\.0 GB, but merging takes about 1\.2 GB: pass max_ram='1\.2GB'"
    ):
        refuse_beyond(10**9, 1_150_000_001, "merging")
    for needed in (1, 999_999_999, 1_000_000_001, 7_649_999_999):
        refuse_beyond(bytes_of(readable(needed)), needed, "merging")
    refuse_beyond(None, 10**15, "merging")
