"""What a contract is made of.

A component (say `rmsnorm`) has exactly one `Component`, the contract, in `components/<name>.py`. It is data and plain
functions: backends are loaded against its signature, the conformance kit runs its cases, laws and error cases, and the
benchmarks time its workloads. Importing a contract imports neither torch nor numpy; its functions import them when
called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .arguments import ArgumentMaker

Kind = Literal["op", "module", "optimizer", "algorithm", "io"]
Arguments = dict[str, Any]
Sizes = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of arguments on which every backend must agree with the oracle.

    `sizes` names the dimensions (and flags) that the contract's `arguments` function reads; `features` names the
    optional abilities the case needs ("mask", "grouped_query", ...): a backend that does not claim them skips the case.
    """

    id: str
    sizes: Sizes = field(default_factory=dict)
    features: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ErrorCase:
    """Arguments that must be refused: `arguments(make)` are passed, `error` must be raised, its text must match
    `match`.
    """

    id: str
    arguments: Callable[[ArgumentMaker], Arguments]
    error: type[Exception] | tuple[type[Exception], ...] = ValueError
    match: str
    features: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Law:
    """A property of every correct implementation; `check(implementation, make)` raises AssertionError if broken."""

    id: str
    statement: str
    check: Callable[[Callable[..., Any], ArgumentMaker], None]
    features: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a result may be from the float64 oracle.

    The root-mean-square error must be at most `factor` times the error that the oracle itself makes when it is run in
    the candidate's dtype, plus `floor` units of that dtype's rounding error times the root-mean-square of the result,
    plus `absolute` float32 (for float64: float64) rounding errors of the number 1, for results that are small
    differences of terms of that order, which are taken in float32 at least, plus `stored` rounding errors of the number
    1 in the candidate's dtype, for results made from numbers of that order that may have been stored in between.
    `reason` derives the numbers in a line. Tolerances belong to the contract: no backend can loosen its own.
    """

    factor: float = 2.0
    floor: float = 2.0
    absolute: float = 0.0
    stored: float = 0.0
    reason: str = "a different but sound order of summation at most doubles the rounding error"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A size worth timing. `bytes_moved` and `flops` count one forward pass; they are functions of the element size in
    bytes.
    """

    id: str
    sizes: Sizes
    bytes_moved: Callable[[int], float] | None = None
    flops: float = 0.0
    backward_bytes_moved: Callable[[int], float] | None = None
    backward_flops: float = 0.0
    device: Literal["any", "cpu", "cuda"] = "any"


@dataclass(frozen=True, kw_only=True)
class Component:
    """The contract of one component. See the module docstring; CONTRIBUTING.md shows how to write one."""

    signature: Callable[..., Any]
    """A typed stub whose name, parameters and docstring are the component's. Backends must accept the same parameters
    (they may add keyword-only ones that have defaults)."""
    kind: Kind
    summary: str
    formula: str
    paper: str
    arguments: Callable[[Case, ArgumentMaker], Arguments]
    """Builds the arguments of a case: deterministic in (case.seed, make.seed), whatever the dtype or device."""
    cases: tuple[Case, ...]
    laws: tuple[Law, ...]
    workloads: tuple[Workload, ...]
    error_cases: tuple[ErrorCase, ...] = ()
    oracle: Callable[..., Any] | None = None
    """An implementation from outside this project's backends (plain PyTorch, say), called with the case's arguments. In
    float64 it is the truth; run in the candidate's dtype it sets the scale of the permitted error."""
    observe: Callable[[Callable[..., Any], Arguments], Any] | None = None
    """How to turn an implementation and its arguments into comparable values, where calling it is not enough
    (an optimizer's steps, a checkpoint's round trip). Default: `implementation(**arguments)`."""
    timed: Callable[[Callable[..., Any], Arguments], Callable[[], Any]] | None = None
    """Prepares an implementation and returns what the benchmarks time, where the call is not it (an optimizer's step).
    Default: calling the implementation with the arguments."""
    exact: bool = False
    """True where results must be equal to the last byte (text and integer algorithms)."""
    differentiable: tuple[str, ...] = ()
    """Arguments whose gradients must match the oracle's."""
    mutates: tuple[str, ...] = ()
    """Arguments that the component is meant to change. Every other argument must come back unchanged."""
    dtypes: tuple[str, ...] = ()
    """Dtypes the contract speaks about, best first; empty for components without tensors."""
    features: tuple[str, ...] = ()
    """Optional abilities that cases may need and backends may claim."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    gradient_tolerance: Tolerance = field(default_factory=lambda: Tolerance(factor=3.0, floor=4.0))
    adapter: str = ""
    """The course's adapter function over this component (in adapters.py); empty where the course has none."""
    composed_of: tuple[str, ...] = ()
    """For composite components: the components that the core's own implementation is built from."""
    composite: str = ""
    """"module:name" of the core's own implementation of a composite component."""

    @property
    def name(self) -> str:
        return self.signature.__name__

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.signature).parameters

    def run(self, implementation: Callable[..., Any], arguments: Arguments) -> Any:
        """The comparable result of `implementation` on `arguments`."""
        return implementation(**arguments) if self.observe is None else self.observe(implementation, arguments)

    def case(self, case_id: str) -> Case:
        for case in self.cases:
            if case.id == case_id:
                return case
        raise KeyError(f"{self.name} has no case {case_id!r}; it has {', '.join(case.id for case in self.cases)}")

    def signature_mismatch(self, implementation: Callable[..., Any]) -> str | None:
        """Why `implementation` can't be called as the contract says, in a sentence, or None when it can."""
        try:
            found = inspect.signature(implementation)
        except (TypeError, ValueError):
            return "its signature can't be read (wrap it in a Python function)"
        bound = implementation.keywords if isinstance(implementation, functools.partial) else {}
        extra_keywords = any(p.kind is p.VAR_KEYWORD for p in found.parameters.values())
        for name, wanted in self.parameters.items():
            if wanted.kind in (wanted.VAR_KEYWORD, wanted.VAR_POSITIONAL) or name in bound:
                continue
            have = found.parameters.get(name)
            if have is None:
                if extra_keywords and wanted.kind is wanted.KEYWORD_ONLY:
                    continue
                return f"parameter {name!r} is missing"
            if wanted.kind is not wanted.KEYWORD_ONLY and have.kind is have.KEYWORD_ONLY:
                return f"parameter {name!r} is keyword-only, the contract passes it by position"
            if have.kind is have.POSITIONAL_ONLY:
                return f"parameter {name!r} is positional-only, the contract passes it by name"
            if wanted.default is not wanted.empty and have.default is have.empty:
                return f"parameter {name!r} has no default, the contract's is {wanted.default!r}"
            if wanted.default is not wanted.empty and not _same_default(have.default, wanted.default):
                return f"parameter {name!r} has default {have.default!r}, the contract's is {wanted.default!r}"
        for name, have in found.parameters.items():
            if name in self.parameters or have.kind in (have.VAR_KEYWORD, have.VAR_POSITIONAL):
                continue
            if have.default is have.empty:
                return f"parameter {name!r} is not in the contract and has no default"
            if have.kind is not have.KEYWORD_ONLY:
                return f"parameter {name!r} is not in the contract and is not keyword-only"
        order = [
            p.name for p in found.parameters.values() if p.name in self.parameters and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        wanted_order = [p.name for p in self.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if order != wanted_order:
            return f"positional parameters are {order}, the contract's are {wanted_order}"
        return None


def _same_default(have: Any, wanted: Any) -> bool:
    return type(have) is type(wanted) and have == wanted
