"""Wrong backends, each with one realistic bug: the kit that judges backends is itself judged by catching all of them.

A mutant is a function, or a class made from the textbook's. Its checks are those of the contract but for the error
cases, unless the bug is about errors: it must be caught for its bug, not for a message it does not bother to raise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ... import registry

TEXTBOOK = "reference"
AREAS: dict[str, tuple[str, ...]] = {
    "text": ("pretoken_counter", "bpe_trainer", "tokenizer"),
    "data": ("get_batch", "save_checkpoint", "load_checkpoint"),
    "normalisation": ("rmsnorm", "add_rmsnorm"),
    "elementwise": ("embedding", "linear", "silu", "swiglu", "softmax"),
    "positions": ("rope",),
    "attention": ("attention",),
    "modules": ("multihead_self_attention", "transformer_block", "transformer_lm"),
    "losses": ("cross_entropy", "linear_cross_entropy"),
    "optimization": ("gradient_clipping", "adamw", "lr_cosine_schedule"),
    "generation": ("generate",),
    "distributed": ("ddp", "fsdp", "sharded_optimizer"),
}
"""File of mutants -> the components it breaks; a file is imported when one of them is asked for."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One wrong implementation. `groups` limits the checks that may catch it; `raises`: it crashes by its bug."""

    name: str
    component: str
    bug: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    groups: tuple[str, ...] = ()
    raises: bool = False

    def build(self) -> Callable[..., Any]:
        """A new copy of the wrong implementation, so that state kept between calls is its own."""
        return self.make(textbook(self.component))


_found: dict[str, Mutant] = {}


def mutant(component: str, bug: str, **details: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function, under its own name, as a wrong `component`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _add(Mutant(name=function.__name__, component=component, bug=bug, make=lambda _: function, **details))
        return function

    return register


def mutation(component: str, bug: str, **details: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that makes a wrong `component` from the textbook's."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _add(Mutant(name=function.__name__, component=component, bug=bug, make=function, **details))
        return function

    return register


def _add(one: Mutant) -> None:
    if one.name in _found:
        raise ValueError(f"two mutants are named {one.name!r}: rename the one of {one.component}")
    _found[one.name] = one


def mutants(components: Sequence[str] | None = None) -> list[Mutant]:
    """The mutants of `components` (default: of all), sorted by component and name."""
    wanted = set(registry.components() if components is None else components)
    for area, names in AREAS.items():
        if wanted & set(names):
            importlib.import_module(f"{__name__}.{area}")
    order = {name: position for position, name in enumerate(registry.components())}
    chosen = [one for one in _found.values() if one.component in wanted]
    return sorted(chosen, key=lambda one: (order[one.component], one.name))


def textbook(component: str) -> Callable[..., Any]:
    """The reference backend's implementation: right, as the kit itself has to find."""
    return registry.get(component, backend=f"{TEXTBOOK}!")
