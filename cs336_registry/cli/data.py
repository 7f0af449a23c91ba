"""`cs336 data download`: text to train on. (`cs336 data encode` is `cs336 tokenizer encode`.)"""

from __future__ import annotations

from pathlib import Path


def download(
    recipe: str,
    /,
    *,
    out: Path | None = None,
    base_url: str | None = None,
    quiet: bool = False,
) -> int:
    """Fetch a corpus: tinystories, owt, or a recipe of your own; continued where it was cut off, and checked.

    Run again, the same command continues, or checks what is there. Examples: `cs336 data download tinystories`, `cs336
    data download owt --out /large/disk/owt`.

    Parameters
    ----------
    recipe
        A recipe's name, or a TOML file: see data/README.md, which also tells sources and licences.
    out
        The folder for the files; by default data/cache/NAME, where the shipped configurations look for them.
    base_url
        A mirror: the address of the folder that has the recipe's files.
    quiet
        Print nothing.
    """
    from ..pipeline import recipes
    from ..pipeline.acquisition import acquire
    from ..pipeline.progress import Progress
    from .text_backends import DEFAULT_CACHE, disk_full

    name, found = recipes.load(recipe)
    progress = Progress(quiet=quiet)
    progress.say(f"{found.title}\nfrom {found.source}; licence: {found.licence}")
    folder = out or DEFAULT_CACHE / name
    with disk_full(folder):
        acquire(found, folder, progress, base_url=base_url)
    if found.next:
        progress.say(f"next: {found.next}")
    return 0
