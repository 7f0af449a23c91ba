"""Recipes of `cs336 data download`: where a corpus lies, under which terms, and what its files must be.

They are TOML files in the project's folder `data`, beside the README about sources and licences.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from ..errors import ConfigurationError, suggestion

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file at base_url + path. bytes and sha256: where they are known."""

    path: str
    bytes: int | None = None
    sha256: Digest | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A corpus that can be downloaded. next: what to do with it, for people."""

    title: str
    source: str
    licence: str
    base_url: str
    files: tuple[RemoteFile, ...]
    paper: str | None = None
    next: str | None = None


def names() -> tuple[str, ...]:
    """The recipes that come with the project."""
    return tuple(sorted(path.stem for path in _folder().glob("*.toml")))


def load(source: str) -> tuple[str, Recipe]:
    """(name, recipe) of a shipped recipe, or of a TOML file."""
    path = Path(source) if source.endswith(".toml") else _folder() / f"{source}.toml"
    if not path.is_file():
        raise ConfigurationError(f"there is no recipe {source!r}: pass a TOML file, or {suggestion(source, names())}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        unknown = [key for key in content if key not in Recipe.__dataclass_fields__]
        if unknown:
            raise ConfigurationError(
                f"{path}: unknown key {unknown[0]!r}: {suggestion(unknown[0], Recipe.__dataclass_fields__)}"
            )
        recipe = msgspec.convert(content, Recipe)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"{path} is not a recipe: {error}") from None
    for file in recipe.files:
        # A recipe may come from anywhere: it must not write anywhere.
        if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
            raise ConfigurationError(f"{path} is not a recipe: {file.path!r} leads out of the folder of the download")
    return path.stem, recipe


def _folder() -> Path:
    """The project's `data`, or the copy of its recipes in an installed package."""
    installed = Path(__file__).parent / "data"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "data"
