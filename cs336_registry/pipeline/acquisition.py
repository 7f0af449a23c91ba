"""Getting a corpus: every file of a recipe downloaded and held against the checksum that is known of it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..text.files import write_json
from .download import DownloadError, digest, fetch
from .progress import Progress
from .recipes import Recipe, RemoteFile
from .run_folder import RunFolder

RECORD = "checksums.json"


def acquire(recipe: Recipe, out: Path, progress: Progress, *, base_url: str | None = None) -> list[Path]:
    """The recipe's files in `out`, each downloaded unless it is there, and checked either way.

    The SHA-256 of a first download is kept in `out`/checksums.json; later ones must be equal (trust on first use).
    """
    base = (base_url or recipe.base_url).rstrip("/") + "/"
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"--base-url is {base!r}: it must begin with http:// or https://")
    with RunFolder(out).locked():
        return [_one(file, base + file.path, out, progress) for file in recipe.files]


def _one(file: RemoteFile, url: str, out: Path, progress: Progress) -> Path:
    target, known = out / file.path, _record(out)
    kept = known.get(file.path, {}).get("sha256")
    wanted, known_from = (file.sha256, "the recipe") if file.sha256 else (kept, f"{RECORD}, by its first download,")
    if target.is_file():
        size, found = target.stat().st_size, digest(target, progress)
        if wanted is not None and found != wanted:
            raise DownloadError(
                f"{target} has SHA-256 {found}, {known_from} says {wanted}: it was changed; delete it to fetch it again"
            )
        proven_by = known_from if wanted else None
    else:
        fetched = fetch(url, target, progress, size=file.bytes, sha256=wanted, known_from=known_from)
        size, found, proven_by = fetched.bytes, fetched.sha256, fetched.proven_by
    trust = (
        f"as {proven_by} says" if proven_by else "taken on trust: nothing was known before, later ones must be equal"
    )
    progress.say(f"{target}: {size:,} bytes, SHA-256 {found}, {trust}")
    if kept is None:
        entry = {"url": url, "bytes": size, "sha256": found, "proven_by": proven_by}
        known[file.path] = entry | {"recorded": datetime.now(UTC).isoformat("T", "seconds")}
        write_json(out / RECORD, known, indent=2)
    return target


def _record(out: Path) -> dict[str, Any]:
    path = out / RECORD
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DownloadError(
            f"{path} is damaged ({error}): delete it; the files are then taken as a first download"
        ) from None
