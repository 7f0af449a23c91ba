"""A process that counts on a cluster of two nodes of this machine and kills one of them in the middle of a shard.

Started by test_ray.py with the corpus and the bytes of a shard; prints what happened as JSON. The second node counts
one shard and holds its next one until it is killed: what it had begun is surely lost. Meanwhile the first node holds
its own, however fast it is, so that there is work left for the second.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ray
from cs336_ray import cluster as counting
from cs336_ray.cluster import count_on_cluster, count_shard
from cs336_ray.pretoken_counter import pretoken_counter
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cs336_registry.text.files import write_text
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.shards import file_ranges
from tests.corpora import SPECIAL_TOKENS


def wake(*nodes: str) -> None:
    """Start a worker on every node, so that none has done all the work before another is up."""
    there = ray.remote(num_cpus=1)(lambda: ray.get_runtime_context().get_node_id())
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    found = ray.get([there.options(scheduling_strategy=strategy).remote() for strategy in strategies])
    assert found == list(nodes)


def started(attempts: int = 3) -> Cluster:
    """A cluster of two nodes. Ray gives a node 30 s to start, which a busy machine may not have: then once more."""
    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
    except Exception as error:
        cluster.shutdown()
        if "timed out during startup" not in str(error) or attempts == 1:
            raise
        return started(attempts - 1)
    return cluster


def wait_until(happened: Callable[[], bool], what: str, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{seconds:g} s went by and {what}")
        time.sleep(0.02)


def held_until_the_kill(one, special_tokens, pattern, counter):
    """`count_shard`: the node that the file .second names comes back once, the other one after the kill."""
    counted = count_shard(one, special_tokens, pattern, counter)
    counted_before, held, killed = map(one.path.with_suffix, (".counted_before", ".held", ".killed"))
    if one.path.with_suffix(".second").read_text() != counted.node:
        wait_until(killed.exists, "the second node was not killed")
        return counted
    if counted_before.exists():
        write_text(held, str(one.start))
        time.sleep(600)
    counted_before.touch()
    return counted


def main() -> None:
    corpus, shard_bytes = Path(sys.argv[1]), int(sys.argv[2])
    cluster = started()
    (second,) = cluster.worker_nodes
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    wake(cluster.head_node.node_id, second.node_id)
    ranges = file_ranges([corpus], GPT2_PATTERN, SPECIAL_TOKENS, shard_bytes)
    counting.count_shard = held_until_the_kill
    write_text(corpus.with_suffix(".second"), second.node_id)
    held = corpus.with_suffix(".held")
    counts: Counter[bytes] = Counter()
    taken: list[int] = []
    nodes: list[str] = []
    killed_after = 0
    for position, counted in count_on_cluster(ranges, SPECIAL_TOKENS, GPT2_PATTERN, "reference", max_retries=8):
        counts.update(counted.words.to_dict())
        taken.append(position)
        nodes.append(counted.node)
        if counted.node == second.node_id and not killed_after:
            wait_until(held.exists, "the second node began no second shard")
            cluster.remove_node(second, allow_graceful=False)
            killed_after = len(taken)
            corpus.with_suffix(".killed").touch()
    starts = [ranges[position].start for position in taken]
    record = {
        "shards": len(ranges),
        "taken": sorted(taken),
        "killed_after": killed_after,
        "nodes": len(set(nodes)),
        "the_head_counted_what_was_lost": nodes[starts.index(int(held.read_text()))] == cluster.head_node.node_id,
        "digest": hashlib.sha256(repr(sorted(counts.items())).encode()).hexdigest(),
    }
    counting.count_shard = count_shard
    # The backend's own function takes the connection that is there, and a task's error is raised as it is.
    again = pretoken_counter(corpus, SPECIAL_TOKENS, counter="reference", shard_bytes=12 * shard_bytes, max_ram="1MB")
    record["the_backend_agrees"] = again == dict(counts)
    damaged = corpus.with_name("damaged.txt.gz")
    damaged.write_bytes(gzip.compress(corpus.read_bytes())[:-9])
    try:
        pretoken_counter([corpus, damaged], SPECIAL_TOKENS, counter="reference", shard_bytes=12 * shard_bytes)
    except ValueError as error:
        record["error"] = str(error)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
