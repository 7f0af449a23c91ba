"""Running a function in worker processes that share nothing with this one: neither its memory nor its `__main__`.

multiprocessing's spawn runs the caller's script again in every worker, so a script without a `__main__` guard would
call the trainer from within the trainer. These workers are plain `python -c` processes fed through pipes. A thread of
each watches its pipe, so that a worker ends as soon as this process has ended, however it did, in the middle of a call
too: nobody would take the answer, and it would only be in the way of the run that comes next.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from typing import Any

_COMMAND = "import sys; sys.path[:] = {path!r}; from cs336_heap_bpe.workers import serve; serve()"


def default_num_workers() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_num_workers(num_workers: int | None) -> int:
    if num_workers is None:
        return default_num_workers()
    if not isinstance(num_workers, int) or num_workers < 1:
        raise ValueError(f"num_workers is {num_workers!r}: it must be at least 1, or None for all processors")
    return num_workers


def run_in_processes(target: str, jobs: Sequence[tuple], num_workers: int) -> Iterator[tuple[int, Any]]:
    """(position of the job, result) as results come, of `target` ("module:function") called with each job's arguments.

    One worker means this process. An exception of the function is raised here. Two jobs a worker are under way at most:
    results wait for whoever takes them, and do not pile up.
    """
    if num_workers == 1 or len(jobs) < 2:
        function = _function(target)
        for position, job in enumerate(jobs):
            yield position, function(*job)
        return
    workers: list[subprocess.Popen] = []
    own, ending = threading.local(), threading.Event()

    def call(job: tuple) -> Any:
        if not hasattr(own, "worker"):
            own.worker = _start()
            workers.append(own.worker)
            if ending.is_set():
                # It came too late for those who kill: they wait for this thread, and it would wait for an answer.
                own.worker.kill()
        return _ask(own.worker, target, job)

    threads = ThreadPoolExecutor(min(num_workers, len(jobs)))
    waiting = enumerate(jobs)
    positions: dict[Future, int] = {}

    def submit(number: int) -> None:
        positions.update((threads.submit(call, job), position) for position, job in islice(waiting, number))

    try:
        submit(2 * num_workers)
        while positions:
            future = next(as_completed(positions))
            # Results are large: none is kept once it has been handed on.
            yield positions.pop(future), future.result()
            submit(1)
    finally:
        ending.set()
        for worker in workers:
            worker.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            # A call that was cut off is still in the buffer of the pipe, and would be written as it is closed.
            with suppress(BrokenPipeError), worker:
                worker.wait()


def serve() -> None:
    """A worker's life: answer calls until the pipe closes."""
    # Ctrl-C reaches the whole group of processes; this one ends with the pipe, without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    calls: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(calls,), daemon=True).start()
    while True:
        call = calls.get()
        try:
            target, job = pickle.loads(call)
            answer = True, _function(target)(*job)
        except Exception as error:
            answer = False, error
        with suppress(BrokenPipeError):
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _receive(calls: SimpleQueue[bytes]) -> None:
    """Hand on what comes through the pipe; end the process with it, whatever is being worked on."""
    try:
        while True:
            calls.put(pickle.load(sys.stdin.buffer))
    finally:
        # Without this thread the process would outlive its pipe, and its parent wait for an answer.
        os._exit(0)


def _start() -> subprocess.Popen:
    command = [sys.executable, "-c", _COMMAND.format(path=[os.path.abspath(entry) for entry in sys.path])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _ask(worker: subprocess.Popen, target: str, job: tuple) -> Any:
    try:
        # Pickled twice: a worker takes in the whole call, then fails to read it as it would fail at the work itself.
        call = pickle.dumps((target, job), pickle.HIGHEST_PROTOCOL)
        pickle.dump(call, worker.stdin, pickle.HIGHEST_PROTOCOL)
        worker.stdin.flush()
        succeeded, result = pickle.load(worker.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        raise ChildProcessError(
            f"a worker process ended with exit code {worker.wait()}: if memory ran out, pass a smaller num_workers"
        ) from None
    if not succeeded:
        raise result
    return result


def _function(target: str) -> Any:
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)
