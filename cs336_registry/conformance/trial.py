"""Running one implementation on one case: fresh arguments, the value, the gradients, and what the oracle says."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import ArgumentMaker
from ..compare import assert_within
from ..component import Arguments, Case, Component
from .values import Layout, first_difference, is_floating, leaves, narrowed, rebuilt, relaid, widened

if TYPE_CHECKING:
    import torch

UpstreamKind = Literal["random", "expanded"]

SEED_STRIDE = 1_000_003
"""Between the seeds of two sessions; a prime larger than any case's own seed, so that no two draws coincide."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Where checks run and with which numbers: every draw follows from `seed` and the case."""

    folder: Path
    seed: int = 0
    device: str = "cpu"
    origin: tuple[str, str] | None = None
    """("backend" or "mutant", its name): where another process finds the implementation."""

    def maker(self, case_seed: int = 0, dtype: str | None = None) -> ArgumentMaker:
        """A fresh ArgumentMaker with a folder of its own, so that the files of two calls never meet."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return ArgumentMaker(
            self.seed * SEED_STRIDE + case_seed, dtype=dtype or "float32", device=self.device, folder=folder
        )

    def arguments(self, contract: Component, case: Case, dtype: str | None) -> Arguments:
        return contract.arguments(case, self.maker(case.seed, dtype))


@dataclass(frozen=True)
class Upstream:
    """The gradients that arrive at a result: random and uneven, or ones expanded from one number, as `.sum()` sends."""

    seed: int
    dtype: str
    kind: UpstreamKind = "random"
    layout: Layout | None = None

    def gradients(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """New tensors at every call, rounded to `dtype`, then of each output's dtype: the oracle sees the same."""
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


@dataclass(frozen=True)
class Gradients:
    """What a backward pass found: the forward result, a gradient for every path, and which results it started from."""

    result: Any
    of: Mapping[str, torch.Tensor]
    connected: frozenset[str]


def gradients_of(
    contract: Component,
    implementation: Callable[..., Any],
    arguments: Arguments,
    upstream: Upstream,
    names: tuple[str, ...] | None = None,
) -> Gradients:
    """The gradient of every floating tensor inside the arguments `names` (default: all differentiable ones)."""
    import torch

    names = contract.differentiable if names is None else names
    arguments = dict(arguments)
    for name in names:
        if name in arguments:
            arguments[name] = rebuilt(arguments[name], _leaf)
    inputs = {path: leaf for name in names for path, leaf in leaves(arguments.get(name), name) if is_floating(leaf)}
    result = contract.run(implementation, arguments)
    outputs = {path: leaf for path, leaf in leaves(result, "result") if is_floating(leaf)}
    # Drawn for every result, so that the oracle and the candidate see the same numbers whatever is connected.
    sent = dict(zip(outputs, upstream.gradients(list(outputs.values())), strict=True))
    connected = [path for path, leaf in outputs.items() if leaf.requires_grad]
    found: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
    if connected and inputs:
        starts, arriving = [outputs[path] for path in connected], [sent[path] for path in connected]
        found = torch.autograd.grad(starts, list(inputs.values()), arriving, allow_unused=True)
    pairs = zip(inputs.items(), found, strict=True)
    of = {path: torch.zeros_like(leaf) if gradient is None else gradient for (path, leaf), gradient in pairs}
    return Gradients(result, of, frozenset(connected))


def assert_agrees(contract: Component, found: Any, case: Case, dtype: str | None, trial: Trial) -> None:
    """`found` against the oracle on the same arguments: equal where the contract is exact, else as close as it says."""
    if contract.oracle is None:
        return
    plain, truth = expected(contract, case, dtype, trial)
    if contract.exact:
        difference = first_difference(found, truth)
        assert difference is None, difference
    else:
        assert_within(found, truth, plain, contract.tolerance)


def assert_gradients_agree(
    contract: Component, found: Gradients, case: Case, dtype: str, trial: Trial, kind: UpstreamKind
) -> None:
    """The gradients `found` against the oracle's, in float64 on the same rounded arguments and upstream gradients."""
    plain, truth = expected_gradients(contract, case, dtype, trial, kind)
    for path, gradient in found.of.items():
        what = f"gradient of {path}"
        assert_within(gradient, truth.of[path], plain.of[path], contract.gradient_tolerance, what=what)


def expected(contract: Component, case: Case, dtype: str | None, trial: Trial) -> tuple[Any, Any]:
    """(what plain PyTorch computes in `dtype`, the truth: the oracle in float64 on the same rounded arguments)."""
    oracle = contract.oracle
    assert oracle is not None

    def run(change: Callable[[Any], Any]) -> Any:
        return contract.run(oracle, change(trial.arguments(contract, case, dtype)))

    def compute() -> tuple[Any, Any]:
        if contract.exact:
            return None, run(_unchanged)
        truth = run(widened)
        return (_shrunk_error(run(narrowed), truth) if dtype == "float64" else run(_unchanged)), truth

    return _remembered((id(contract), case.id, dtype, trial.seed, trial.device), contract, compute)


def expected_gradients(
    contract: Component, case: Case, dtype: str, trial: Trial, kind: UpstreamKind
) -> tuple[Gradients, Gradients]:
    """The same for the gradients of all differentiable arguments."""
    oracle = contract.oracle
    assert oracle is not None

    def run(change: Callable[[Any], Any]) -> Gradients:
        arguments = change(trial.arguments(contract, case, dtype))
        return gradients_of(contract, oracle, arguments, Upstream(trial.seed, dtype, kind))

    def compute() -> tuple[Gradients, Gradients]:
        truth = run(widened)
        plain = run(narrowed if dtype == "float64" else _unchanged)
        if dtype == "float64":
            plain = Gradients(None, _shrunk_error(plain.of, truth.of), plain.connected)
        return plain, truth

    return _remembered((id(contract), case.id, dtype, trial.seed, trial.device, kind), contract, compute)


_memory: dict[tuple[Any, ...], tuple[Component, Any]] = {}
"""The oracle's latest answers, since most groups of checks ask for the same ones."""
MEMORY_SIZE = 256


def _remembered(key: tuple[Any, ...], contract: Component, compute: Callable[[], Any]) -> Any:
    # The contract is kept beside the answer so that its id can't be reused.
    if key not in _memory:
        while len(_memory) >= MEMORY_SIZE:
            _memory.pop(next(iter(_memory)), None)
        _memory[key] = (contract, compute())
    return _memory[key][1]


def _unchanged(value: Any) -> Any:
    return value


def _shrunk_error(narrow: Any, truth: Any) -> Any:
    """What plain PyTorch may lose in float64: its error in float32, smaller by the ratio of the rounding errors.

    The oracle in float64 is the truth itself, so its own error there can't be seen.
    """
    if isinstance(truth, Mapping):
        return {key: _shrunk_error(narrow[key], truth[key]) for key in truth}
    if isinstance(truth, list | tuple):
        return [_shrunk_error(one, other) for one, other in zip(narrow, truth, strict=True)]
    if not is_floating(truth):
        return truth
    import torch

    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return truth.detach() + ((narrow.detach().double() - truth.detach()) * ratio).nan_to_num(0.0, 0.0, 0.0)


def _leaf(value: Any) -> Any:
    """A differentiable leaf with the same values and strides; what already is one stays itself."""
    if not is_floating(value) or (value.requires_grad and value.is_leaf):
        return value
    return value.detach().requires_grad_()
