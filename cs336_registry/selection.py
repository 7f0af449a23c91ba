"""Which backend is wanted: the selector grammar and the layers it is read from.

A selector is a comma list of `[component=]backend[!|?]`. A bare backend is a preference (others serve what it lacks), a
component's backend is a demand (it runs or an error is raised); `!` turns a preference into a demand, `?` a demand into
a preference. Layers, highest first: argument, `use()`, `--backend`, CS336_BACKEND, [tool.cs336] in pyproject.toml,
default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .errors import SelectorError

AUTO = "auto"
"""The pseudo backend that stands for the fastest available ones, in the committed benchmark order."""

_ITEM = re.compile(r"(?:(?P<component>[a-z][a-z0-9_]*)\s*=\s*)?(?P<backend>[a-z][a-z0-9_]*)(?P<strength>[!?]?)")


@dataclass(frozen=True)
class Choice:
    """One item of a selector: `backend` for `component` (None: for every component); a demand must be met."""

    backend: str
    component: str | None = None
    demand: bool = False

    def __str__(self) -> str:
        usual = self.component is not None
        strength = "" if self.demand == usual else "!" if self.demand else "?"
        return f"{self.component}={self.backend}{strength}" if self.component else f"{self.backend}{strength}"


@dataclass(frozen=True)
class Selection:
    """A parsed selector."""

    choices: tuple[Choice, ...] = ()

    def for_component(self, component: str) -> Iterator[Choice]:
        """The choices that speak about `component`: its own before the general ones, otherwise in the order written."""
        yield from (choice for choice in self.choices if choice.component == component)
        yield from (choice for choice in self.choices if choice.component is None)

    def __str__(self) -> str:
        return ",".join(map(str, self.choices))


@dataclass(frozen=True)
class Layer:
    """A selection and the place it was read from, such as "CS336_BACKEND"."""

    name: str
    selection: Selection


@lru_cache(maxsize=256)
def parse(selector: str) -> Selection:
    """`selector` as a Selection; SelectorError names the item that can't be read and what was expected."""
    if not isinstance(selector, str):
        raise SelectorError(f"a selector is text such as 'triton,adamw=torch', not {selector!r}")
    choices: list[Choice] = []
    for item in selector.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise SelectorError(
                f"can't read {item.strip()!r} in selector {selector!r}: write [component=]backend[!|?], separated by "
                f"commas, for example 'triton,adamw=torch'"
            )
        component, strength = match["component"], match["strength"]
        choices.append(
            Choice(match["backend"], component, demand=strength == "!" or (component is not None and strength != "?"))
        )
    seen: dict[str, Choice] = {}
    for choice in choices:
        if choice.component is None:
            continue
        if choice.component in seen:
            raise SelectorError(
                f"selector {selector!r} chooses {choice.component!r} twice ({seen[choice.component]} and {choice}): "
                f"keep one"
            )
        seen[choice.component] = choice
    return Selection(tuple(choices))
