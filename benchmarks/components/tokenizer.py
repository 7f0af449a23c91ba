"""`tokenizer` on every available backend, judged first. Options: those of `cs336 bench`."""

import sys

from cs336_registry.cli import main

main(["bench", "tokenizer", *sys.argv[1:]])
