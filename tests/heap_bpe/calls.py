"""Functions for worker processes to call: kept apart, so that a worker imports nothing else."""

from __future__ import annotations

import os


def failing(argument):
    raise ValueError(f"no {argument}")


def dying(argument):
    os._exit(3)


class Unreadable:
    """What can be sent, and not be received."""

    def __reduce__(self):
        return failing, ("receiver",)


def doubled(number):
    print("this goes to stderr, not into the answers")
    return 2 * number


def endless(folder):
    """Work that never ends, under a name that tells which process does it."""
    open(os.path.join(folder, str(os.getpid())), "w").close()
    while True:
        pass
