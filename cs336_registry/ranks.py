"""Running a function on every rank of a small process group on this machine, for contracts and tests.

The processes are started once and kept: starting them takes seconds, one more call takes milliseconds. They meet
through a file (no port is opened beyond the loopback), talk through gloo and use one thread each.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any

TIMEOUT = timedelta(seconds=180)
"""How long the ranks may take together."""
GRACE = 5.0
"""Seconds that the other ranks have left when one has failed: they may wait for it for ever."""

_lock = threading.Lock()
_workers: dict[int, list[tuple[Any, Any]]] = {}


def run_on_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """`[function(rank, *arguments) for rank in range(world_size)]`, each in a process of its own, in one gloo group.

    function: a module's own function, as the processes import it; arguments and results are pickled. The error of the
    first rank that fails is raised here. Raises TimeoutError where the ranks wait for each other for ever.
    """
    with _lock, tempfile.TemporaryDirectory(prefix="cs336-ranks-") as folder:
        workers = _workers.get(world_size) or _start(world_size)
        for rank, (_, pipe) in enumerate(workers):
            meeting = os.path.join(folder, "meeting")
            pipe.send_bytes(pickle.dumps((rank, world_size, meeting, function, arguments)))
        try:
            return _collect([pipe for _, pipe in workers])
        except BaseException:
            _stop(world_size)
            raise


def _collect(pipes: list[Any]) -> list[Any]:
    """The results in the order of the ranks; whatever a rank raised is raised."""
    results: dict[Any, Any] = {}
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while len(results) < len(pipes):
        waiting = [pipe for pipe in pipes if pipe not in results]
        ready: list[Any] = connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = ", ".join(str(pipes.index(pipe)) for pipe in waiting)
            raise TimeoutError(f"no answer from rank {silent} within {TIMEOUT.total_seconds():.0f} s")
        for pipe in ready:
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError as error:
                raise RuntimeError(f"the process of rank {pipes.index(pipe)} died") from error
            if not succeeded:
                raise value
            results[pipe] = value
    return [results[pipe] for pipe in pipes]


def _start(world_size: int) -> list[tuple[Any, Any]]:
    context = get_context("spawn")
    workers = []
    for _ in range(world_size):
        pipe, far_end = context.Pipe()
        process = context.Process(target=_serve, args=(far_end,), daemon=True)
        process.start()
        far_end.close()
        workers.append((process, pipe))
    _workers[world_size] = workers
    return workers


def _stop(world_size: int) -> None:
    deadline = time.monotonic() + GRACE
    for process, pipe in _workers.pop(world_size):
        pipe.close()
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _serve(pipe: Any) -> None:
    """What each process does: one task after the other, until the pipe is closed."""
    # The name of a machine need not resolve; the loopback is always there.
    if os.path.isdir("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch

    torch.set_num_threads(1)
    # When the pipe breaks, whoever asked is gone and there is nobody left to tell.
    with suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(task: bytes) -> bytes:
    """(True, result) or (False, error), pickled."""
    try:
        return pickle.dumps((True, _run(*pickle.loads(task))))
    except BaseException as error:
        return pickle.dumps((False, error))


def _run(rank: int, world_size: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{meeting}", timeout=TIMEOUT, rank=rank, world_size=world_size)
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()
