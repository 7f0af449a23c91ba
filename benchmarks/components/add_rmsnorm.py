"""`add_rmsnorm` on every available backend, judged first. Options: those of `cs336 bench`."""

import sys

from cs336_registry.cli import main

main(["bench", "add_rmsnorm", *sys.argv[1:]])
