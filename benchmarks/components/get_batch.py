"""`get_batch` on every available backend, judged first. Options: those of `cs336 bench`."""

import sys

from cs336_registry.cli import main

main(["bench", "get_batch", *sys.argv[1:]])
