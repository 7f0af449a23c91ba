"""Running a function on every rank of a small process group on this machine, for contracts and tests.

The processes are started once and kept: starting them takes seconds, one more call takes milliseconds. They meet
through a file (no port is opened beyond the loopback), talk through gloo and use one thread each.
"""

from __future__ import annotations

import atexit
import os
import pickle
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed, wait
from datetime import timedelta
from typing import Any

TIMEOUT = timedelta(seconds=120)
"""How long a rank waits for the others before it gives up."""

_lock = threading.Lock()
_pools: dict[int, ProcessPoolExecutor] = {}


def run_on_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """`[function(rank, *arguments) for rank in range(world_size)]`, each in a process of its own, in one gloo group.

    function: a module's own function, as the processes import it; arguments and results are pickled. The error of the
    first rank that fails is raised here.
    """
    task = pickle.dumps((function, arguments))
    with _lock, tempfile.TemporaryDirectory(prefix="cs336-ranks-") as folder:
        pool = _pools.get(world_size) or _start(world_size)
        meeting = os.path.join(folder, "meeting")
        # Every rank waits for all others, so each process takes exactly one.
        futures = [pool.submit(_run, rank, world_size, meeting, task) for rank in range(world_size)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            wait(futures, timeout=2 * TIMEOUT.total_seconds())
            _stop(world_size)
            raise
        return [pickle.loads(future.result()) for future in futures]


def _start(world_size: int) -> ProcessPoolExecutor:
    import multiprocessing

    _pools[world_size] = ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn"))
    return _pools[world_size]


def _stop(world_size: int) -> None:
    _pools.pop(world_size).shutdown(cancel_futures=True)


@atexit.register
def _stop_all() -> None:
    for world_size in list(_pools):
        _stop(world_size)


def _run(rank: int, world_size: int, meeting: str, task: bytes) -> bytes:
    # The name of a machine need not resolve; the loopback is always there.
    if os.path.isdir("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    function, arguments = pickle.loads(task)
    dist.init_process_group("gloo", f"file://{meeting}", timeout=TIMEOUT, rank=rank, world_size=world_size)
    try:
        return pickle.dumps(function(rank, *arguments))
    finally:
        dist.destroy_process_group()
