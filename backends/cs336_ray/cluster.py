"""Shards as Ray tasks: https://docs.ray.io/en/latest/ray-core/fault_tolerance/tasks.html.

A task gets a range of a file and gives its sorted counts. A few for each processor of the cluster are under way at a
time, so results do not pile up. Ray runs a task again when its node dies, and also when a finished result is lost with
the node that held it; each result is taken once, so nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cs336_registry as registry
from cs336_registry.text.shards import FileRange, count_range
from cs336_registry.text.training_cache import WordCounts

TASKS_PER_CPU = 2


@dataclass(frozen=True)
class Counted:
    """The counts of one shard, and the node that made them."""

    words: WordCounts
    node: str


def count_shard(one: FileRange, special_tokens: Sequence[str], pattern: str, counter: str) -> Counted:
    """The task: sorted counts of one range, by the backend that `counter` selects on that machine."""
    import ray

    context = ray.get_runtime_context()
    found = one.path.stat().st_size if one.path.is_file() else None
    if found != one.size:
        raise FileNotFoundError(
            f"{one.path} has {found} bytes on node {context.get_node_id()[:8]}, {one.size} where the work was given "
            f"out: put the corpus where all nodes read the same files"
        )
    words = count_range(registry.get("pretoken_counter", backend=counter), one, special_tokens, pattern)
    return Counted(words, context.get_node_id())


def count_on_cluster(
    ranges: Sequence[FileRange], special_tokens: Sequence[str], pattern: str, counter: str, max_retries: int
) -> Iterator[tuple[int, Counted]]:
    """(position of the range, its counts) as they come in."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=max_retries)(count_shard)
    under_way: dict[Any, int] = {}
    waiting = iter(enumerate(ranges))
    most = max(2, TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1)))
    while True:
        while len(under_way) < most and (following := next(waiting, None)) is not None:
            position, one = following
            under_way[task.remote(one, special_tokens, pattern, counter)] = position
        if not under_way:
            return
        ready, _ = ray.wait(list(under_way), num_returns=1)
        for reference in ready:
            try:
                counted = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                # The task's own error, as it would have been raised here.
                raise error.cause from None
            yield under_way.pop(reference), counted


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """A connection to a cluster; one that is there already is used and stays."""
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(address=address, include_dashboard=False if address is None else None, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
