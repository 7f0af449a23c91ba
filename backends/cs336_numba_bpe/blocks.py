"""Typed memory that kernels work in, as memoryviews: importing numpy takes longer than training on a small corpus.

A view's format is one of the letters of `DTYPES`. Large blocks come straight from the system: zeros that cost nothing
until they are touched, in huge pages where there are any, so that random accesses miss the page tables' cache less.
"""

from __future__ import annotations

import mmap
import sys
from array import array
from collections.abc import Iterable
from typing import Literal

Kind = Literal["B", "H", "i", "q", "Q"]
DTYPES = {"B": "uint8", "H": "uint16", "i": "int32", "q": "int64", "Q": "uint64"}
"""numpy's names."""
MAPPED_BYTES = 1 << 16
HUGE_PAGE_BYTES = 1 << 22
"""Smaller blocks would waste more of a huge page of 2 MiB than they gain."""

PRIVATE = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
"""Memory that processes could share, which is mmap's default, gets no huge pages."""


def zeros(kind: Kind, *shape: int) -> memoryview:
    """A block of zeros, of one dimension or two."""
    length = shape[0] if len(shape) == 1 else shape[0] * shape[1]
    if length * array(kind).itemsize < MAPPED_BYTES:
        view = memoryview(array(kind, bytes(length * array(kind).itemsize)))
    else:
        block = mmap.mmap(-1, length * array(kind).itemsize, **PRIVATE)
        if len(block) >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
            block.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(block).cast(kind)
    return view if len(shape) == 1 else view.cast("B").cast(kind, shape)


def of(kind: Kind, values: Iterable[int]) -> memoryview:
    return memoryview(array(kind, values))


def grown(view: memoryview, length: int, used: int | None = None) -> memoryview:
    """A longer block that begins with the first `used` numbers of `view`, by default with all of them."""
    used = len(view) if used is None else used
    larger = zeros(view.format, length)  # type: ignore[arg-type]
    larger[:used] = view[:used]
    return larger
