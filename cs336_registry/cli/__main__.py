"""`python -m cs336_registry.cli`, which is what torchrun starts."""

from . import main

main()
