"""The processes that train together: those that torchrun started, or this one alone.

A process alone forms a group of one, in which nothing is sent and every method answers at once, so the trainer has no
second way of doing things. In a larger group small facts (whether to stop, a loss, a decision) travel as CPU tensors
through gloo, also where gradients travel through NCCL.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import RunError
from .stopping import finish_first

PATIENCE = timedelta(days=7)
"""How long the others wait for the first process to make the data: as long as it lives."""

LOST_CONTACT = ("gloo", "Connection closed by peer", "Connection reset by peer", "timeout caused pair closure")
"""What gloo's errors, which have no type of their own, can be told by."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class ProcessGroup:
    """This process's rank among `world_size`. Every method but the properties must be called by all of them."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process prints, writes metrics and decides."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        if not self.alone:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.alone else bool(self.total(torch.tensor(int(flag))))

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def decided(self, make: Callable[[], Result]) -> Result:
        """What `make` gives on the first process, on all of them."""
        if self.alone:
            return make()
        box: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def prepared(self, make: Callable[[], Result], find: Callable[[], Result]) -> Result:
        """`make` on the first process, however long it takes; then `find` on the others.

        What the first process raises stops the others too, as a RunError of the same words.
        """
        if self.alone:
            return make()
        patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        problem: list[str | None] = [None]
        try:
            if not self.first:
                dist.broadcast_object_list(problem, src=0, group=patient)
                if problem[0] is not None:
                    raise RunError(problem[0])
                return find()
            try:
                made = make()
            except BaseException as error:
                dist.broadcast_object_list([str(error) or type(error).__name__], src=0, group=patient)
                raise
            dist.broadcast_object_list(problem, src=0, group=patient)
            return made
        finally:
            dist.destroy_process_group(patient)

    @contextmanager
    def in_contact(self, kept: Callable[[], str]) -> Iterator[None]:
        """Turns a lost connection into a RunError that says what is kept, and leaves the time to print it."""
        try:
            yield
        except RuntimeError as error:
            if self.alone or not lost_contact(error):
                raise
            finish_first()
            reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
            raise RunError(
                f"rank {self.rank} of {self.world_size} lost the other processes ({reason}): one of them ended or "
                f"hangs, and what it printed says why; {kept()}. Run the same command again to continue"
            ) from error


def current() -> ProcessGroup:
    """The group that this process is in."""
    if dist.is_available() and dist.is_initialized():
        return ProcessGroup(dist.get_rank(), dist.get_world_size())
    return ProcessGroup()


@contextmanager
def joined(device: str, timeout: float) -> Iterator[ProcessGroup]:
    """Within the block, the group that torchrun describes in the environment; without torchrun, this process alone.

    device: "cpu", "cuda" or "auto", where each process takes the GPU of its local rank. timeout: seconds after which a
    process that waits for another gives up.
    """
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if world_size == 1:
        yield ProcessGroup()
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise RunError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: start the processes with torchrun "
            f"--nproc-per-node {world_size} -m cs336_registry.cli train ..., or unset WORLD_SIZE"
        )
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size) and os.path.isdir("/sys/class/net/lo"):
        # On one machine the loopback is always there, whereas the machine's own name need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    if dist.get_rank():
        # The first process warns for all.
        warnings.simplefilter("ignore")
    try:
        yield current()
    finally:
        dist.destroy_process_group()


def _take_gpu(local_rank: int) -> None:
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise RunError(
            f"rank {os.environ['RANK']} needs a GPU of its own, and this machine has {found} for "
            f"{os.environ.get('LOCAL_WORLD_SIZE', 'more')} processes: start torchrun with --nproc-per-node {found}, or "
            f"set training.device=cpu"
        )
    torch.cuda.set_device(local_rank)


def lost_contact(error: Exception) -> bool:
    """Whether this is how PyTorch says that another process is gone or silent."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST_CONTACT)
