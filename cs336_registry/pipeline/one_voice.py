"""An error that all processes of a torchrun have (a typing error in the configuration) is printed once, not by each.

The processes may have failed before they formed a group, so what the first one failed with is left in torchrun's store.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from ..errors import RegistryError
from .errors import RunError

PATIENCE = timedelta(seconds=5)
"""How long a process that failed waits to hear of the first one's failure."""


@contextmanager
def one_voice() -> Iterator[None]:
    """Within the block: the first process raises what it fails with, another only what the first did not say."""
    try:
        yield
    except (RegistryError, ValueError, OSError, NotImplementedError) as error:
        # What torchrun sets where it keeps the store itself.
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
            raise
        rank = int(os.environ["RANK"])
        heard = _first_error(rank, str(error))
        if rank == 0:
            raise
        if heard == str(error):
            sys.exit(1)
        raise RunError(f"rank {rank}: {error}") from error


def _first_error(rank: int, text: str) -> str | None:
    """What the first process failed with, if it did; `text` if this is the first process."""
    from torch.distributed.rendezvous import rendezvous

    store = next(iter(rendezvous("env://")))[0]
    if rank == 0:
        store.set("cs336_error", text)
    try:
        store.wait(["cs336_error"], PATIENCE)
    except RuntimeError:
        return None
    return store.get("cs336_error").decode()
