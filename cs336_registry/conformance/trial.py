"""Running one implementation on one case: fresh arguments, the value, the gradients, and what the oracle says of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import ArgumentMaker
from ..compare import assert_within
from ..component import Arguments, Case, Component
from .values import Layout, first_difference, is_floating, leaves, rebuilt, relaid, widened

if TYPE_CHECKING:
    import torch

SEED_STRIDE = 1_000_003
"""Between the seeds of two sessions; a prime larger than any case's own seed, so that no two draws coincide."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Where checks run and with which numbers: every draw follows from `seed` and the case."""

    folder: Path
    seed: int = 0
    device: str = "cpu"

    def maker(self, case_seed: int = 0, dtype: str | None = None) -> ArgumentMaker:
        """A fresh ArgumentMaker with a folder of its own, so that the files of two calls never meet."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return ArgumentMaker(self.seed * SEED_STRIDE + case_seed, dtype=dtype or "float32", device=self.device, folder=folder)

    def arguments(self, contract: Component, case: Case, dtype: str | None) -> Arguments:
        return contract.arguments(case, self.maker(case.seed, dtype))


@dataclass(frozen=True)
class Upstream:
    """The gradients that arrive at a result: random and uneven, or all ones expanded from one number, as `.sum()` sends them."""

    seed: int
    dtype: str
    kind: Literal["random", "expanded"] = "random"
    layout: Layout | None = None

    def gradients(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """New tensors at every call, rounded to `dtype` and then of each output's dtype: the oracle sees the same numbers."""
        import torch

        make = ArgumentMaker(self.seed + 17, dtype=self.dtype)
        found = []
        for output in outputs:
            if self.kind == "expanded":
                gradient = torch.ones((), dtype=output.dtype, device=output.device).expand(output.shape)
            else:
                gradient = make.normal(*output.shape).to(output.device, output.dtype)
            found.append(gradient if self.layout is None else relaid(gradient, self.layout))
        return found


def gradients_of(
    contract: Component,
    implementation: Callable[..., Any],
    arguments: Arguments,
    upstream: Upstream,
    names: tuple[str, ...] | None = None,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The result, and the gradient of every floating tensor inside the arguments `names` (default: all differentiable ones)."""
    import torch

    names = contract.differentiable if names is None else names
    arguments = dict(arguments)
    for name in names:
        if name in arguments:
            arguments[name] = rebuilt(arguments[name], _leaf)
    inputs = {path: leaf for name in names for path, leaf in leaves(arguments.get(name), name) if is_floating(leaf)}
    result = contract.run(implementation, arguments)
    outputs = [(path, leaf) for path, leaf in leaves(result) if is_floating(leaf)]
    for path, leaf in outputs:
        assert leaf.requires_grad or not inputs, f"result{path} is cut off from the graph: no gradient reaches {', '.join(names)}"
    tensors = [leaf for _, leaf in outputs]
    found = torch.autograd.grad(tensors, list(inputs.values()), upstream.gradients(tensors), allow_unused=True)
    pairs = zip(inputs.items(), found, strict=True)
    return result, {path: torch.zeros_like(leaf) if gradient is None else gradient for (path, leaf), gradient in pairs}


def assert_agrees(contract: Component, found: Any, arguments: Callable[[], Arguments]) -> None:
    """`found` against the oracle on the same arguments (a function that makes them anew): float64 is the truth."""
    if contract.oracle is None:
        return
    plain = contract.run(contract.oracle, arguments())
    if contract.exact:
        difference = first_difference(found, plain)
        assert difference is None, difference
        return
    truth = contract.run(contract.oracle, widened(arguments()))
    assert_within(found, truth, plain, contract.tolerance)


def assert_gradients_agree(
    contract: Component,
    found: Mapping[str, torch.Tensor],
    arguments: Callable[[], Arguments],
    upstream: Upstream,
    names: tuple[str, ...] | None = None,
) -> None:
    """The gradients `found` against the oracle's, taken in float64 on the same rounded arguments and upstream gradients."""
    assert contract.oracle is not None
    _, plain = gradients_of(contract, contract.oracle, arguments(), upstream, names)
    _, truth = gradients_of(contract, contract.oracle, widened(arguments()), upstream, names)
    for path, expected in truth.items():
        assert_within(found[path], expected, plain[path], contract.gradient_tolerance, what=f"gradient of {path}")


def _leaf(value: Any) -> Any:
    """A differentiable leaf with the same values and strides; what already is one stays itself."""
    if not is_floating(value) or (value.requires_grad and value.is_leaf):
        return value
    return value.detach().requires_grad_()
