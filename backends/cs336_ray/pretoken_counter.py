"""Counting pretokens on a Ray cluster: a task counts one shard, wherever it runs, and runs again where a node is lost.

The nodes read the files themselves, under the same paths: put the corpus on storage that all of them see.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cs336_registry.components.pretoken_counter import check
from cs336_registry.text.accumulator import Accumulator
from cs336_registry.text.inputs import STANDARD_INPUT, InputPath
from cs336_registry.text.memory import bytes_of
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.progress import Progress
from cs336_registry.text.shards import file_ranges

from .cluster import connected, count_on_cluster

SHARD_BYTES = 256 << 20
"""A shard is what a lost node costs; at hundreds of megabytes a second of a cluster, starting tasks costs little."""
MAX_RETRIES = 8


def pretoken_counter(
    input_path: InputPath,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    address: str | None = None,
    counter: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    max_retries: int = MAX_RETRIES,
    max_ram: int | str | None = None,
    progress: bool | None = None,
) -> dict[bytes, int]:
    """The contract's counts. A corpus no larger than a shard is counted here, without a cluster.

    address: a cluster's, by default the one this process is connected to, RAY_ADDRESS, or a cluster of this machine
    alone. counter: a selector of the backend that counts each shard. max_retries: how often a shard is counted again
    after its node died. max_ram: bytes, or a string such as "2GB", for the sum here: what outgrows it goes to disk.
    """
    paths, tokens = check(input_path, special_tokens, pattern)
    if shard_bytes < 1 or max_retries < 0:
        raise ValueError(f"shard_bytes is {shard_bytes}, max_retries {max_retries}: at least 1 and at least 0")
    budget = bytes_of(max_ram)
    if any(path == STANDARD_INPUT or not path.is_file() for path in paths):
        # A stream can't be read on another machine.
        return _here(counter)(paths, tokens, pattern=pattern)
    total = sum(path.stat().st_size for path in paths)
    if total <= shard_bytes:
        return _here(counter)(paths, tokens, pattern=pattern)
    ranges = file_ranges([path.absolute() for path in paths], pattern, tokens, shard_bytes)
    with (
        connected(address or os.environ.get("RAY_ADDRESS")),
        Accumulator(None if budget is None else budget // 2) as sums,
        Progress("counting", total, "bytes", enabled=progress) as report,
    ):
        done = 0
        for position, counted in count_on_cluster(ranges, tokens, pattern, counter, max_retries):
            sums.add(counted.words)
            done += ranges[position].end - ranges[position].start
            report.update(done)
        return sums.total().to_dict()


def _here(counter: str):
    import cs336_registry as registry

    return registry.get("pretoken_counter", backend=counter)
