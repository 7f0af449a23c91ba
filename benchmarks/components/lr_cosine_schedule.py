"""`lr_cosine_schedule` on every available backend, judged first. Options: those of `cs336 bench`."""

import sys

from cs336_registry.cli import main

main(["bench", "lr_cosine_schedule", *sys.argv[1:]])
