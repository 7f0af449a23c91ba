"""`multihead_self_attention` on every available backend, judged first. Options: those of `cs336 bench`."""

import sys

from cs336_registry.cli import main

main(["bench", "multihead_self_attention", *sys.argv[1:]])
