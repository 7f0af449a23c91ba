"""`linear_cross_entropy` on every available backend, judged first. Options: those of `cs336 bench`."""

import sys

from cs336_registry.cli import main

main(["bench", "linear_cross_entropy", *sys.argv[1:]])
