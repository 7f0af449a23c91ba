"""`pretoken_counter` on every available backend, judged first. Options: those of `cs336 bench`."""

import sys

from cs336_registry.cli import main

main(["bench", "pretoken_counter", *sys.argv[1:]])
