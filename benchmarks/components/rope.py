"""`rope` on every available backend, judged first. Options: those of `cs336 bench`."""

import sys

from cs336_registry.cli import main

main(["bench", "rope", *sys.argv[1:]])
