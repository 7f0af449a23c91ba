"""Memory ceilings: what "2GB" is, and what a run says when one can't be kept."""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(size: int | str | None) -> int | None:
    """A memory size in bytes: 2000000000, "2GB", "512 MiB"; None stays None. Raises ValueError for anything else."""
    if size is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(size).strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ValueError(
            f"max_ram is {size!r}: give bytes, or a number with KB, MB, GB, KiB, MiB or GiB, such as '2GB'"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def readable(num_bytes: float) -> str:
    """Bytes for people, never less than they are: "340 MB", "1.3 GB"."""
    megabytes = -(-num_bytes // 10**6)
    return f"{-(-megabytes // 100) / 10:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def refuse_beyond(max_ram: int | None, needed: int, what: str) -> None:
    """Raise MemoryError, before the work is begun, where `needed` bytes (estimated) pass the ceiling."""
    if max_ram is not None and needed > max_ram:
        raise MemoryError(
            f"max_ram is {readable(max_ram)}, but {what} takes about {readable(needed)}: "
            f"pass max_ram={readable(needed).replace(' ', '')!r} or more"
        )


def growth(size: int, half: tuple[int, int], whole: tuple[int, int]) -> float:
    """How many times as many unique pretokens `size` bytes of a corpus hold as a sample of it does.

    By Heaps' law, unique = k * bytes ** b, with b from (bytes, unique) of half of the sample and of the whole sample.
    """
    exponent = math.log(whole[1] / half[1]) / math.log(whole[0] / half[0])
    return (size / whole[0]) ** min(1.0, max(0.0, exponent))
