"""What the kit asks of an implementation. Every check follows from the contract; a backend brings its claims alone.

A check runs one implementation and raises AssertionError when it is wrong. The groups, in the order a person wants to
read failures: signature, case, gradient, error, law, layout, poison, mutation, again, repeat, threads, processes.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ..component import Arguments, Case, Component, ErrorCase, Law
from ..machine import Machine, detect
from ..plugin import Implementation
from .poison import nan_in_uninitialised_memory
from .trial import (
    Gradients,
    Trial,
    Upstream,
    UpstreamKind,
    assert_agrees,
    assert_gradients_agree,
    expected_gradients,
    gradients_of,
)
from .values import LAYOUTS, Layout, copied, first_difference, relaid

THREADS = 4
ROUNDS = 3
"""Of the threads over the cases; and how often the contract's first case is repeated."""


@dataclass(frozen=True)
class Check:
    """One question to an implementation: `group[id]`, such as `case[rmsnorm-course-float32]`."""

    group: str
    contract: Component
    subject: Case | ErrorCase | Law | None = None
    dtype: str | None = None
    """None where the contract has no dtypes, or where the best claimed one is enough."""

    @property
    def id(self) -> str:
        return "-".join(
            part for part in (self.contract.name, self.subject.id if self.subject else "", self.dtype or "") if part
        )

    def __str__(self) -> str:
        return f"{self.group}[{self.id}]"

    def unclaimed(self, claims: Implementation, machine: Machine, device: str = "cpu") -> list[str]:
        """Every claim that `claims` would have to make for this check to be asked; empty where it must be passed."""
        from ..decision import Request, rejections

        sizes = getattr(self.subject, "sizes", {})
        request = Request(
            component=self.contract.name,
            device=device if self.contract.dtypes else None,
            dtype=self.dtype,
            gradient=True if self.group == "gradient" else None,
            features=getattr(self.subject, "features", ()),
            sizes={name: size for name, size in sizes.items() if type(size) is int},
        )
        reasons = rejections(claims, request, machine)
        if self.group == "repeat" and not claims.deterministic:
            reasons.append("it does not claim deterministic=True")
        if self.group == "threads" and not claims.thread_safe:
            reasons.append("it does not claim thread_safe=True")
        if self.group == "processes" and not claims.process_safe:
            reasons.append("it does not claim process_safe=True")
        return reasons

    def depends_on(self, trial: Trial, claims: Implementation) -> bool:
        """Whether other seeds than the trial's could change the verdict on a correct implementation.

        The words of an error have no numbers; a changed argument is seen whatever it holds; and a second call is judged
        by its own numbers, as the case is. Cases whose text or numbers are written down are the same for every seed.
        """
        if self.group in ("law", "gradient", "threads", "processes"):
            return True
        if self.group not in ("case", "layout", "poison", "repeat") or not isinstance(self.subject, Case):
            return False
        dtype = self.dtype or best_dtype(self.contract, claims)
        drawn = [copied(one.arguments(self.contract, self.subject, dtype)) for one in (trial, next_trial(trial))]
        return first_difference(*drawn) is not None

    def run(self, implementation: Callable[..., Any], claims: Implementation, trial: Trial) -> None:
        """Raise AssertionError, or whatever the implementation raises, where `implementation` is wrong."""
        dtype = self.dtype or best_dtype(self.contract, claims)
        _RUN[self.group](_Question(self.contract, self.subject, dtype, claims, trial), implementation)


def best_dtype(contract: Component, claims: Implementation) -> str | None:
    """The first of the contract's dtypes that is claimed, for checks that one dtype is enough for."""
    claimed = [dtype for dtype in contract.dtypes if not claims.dtypes or dtype in claims.dtypes]
    return next(iter(claimed or contract.dtypes), None)


def checks(contract: Component) -> list[Check]:
    """Every check of a contract, in the order of the groups; claims decide later which of them are asked."""
    found = [Check("signature", contract)]
    dtypes: tuple[str | None, ...] = contract.dtypes or (None,)
    found += [Check("case", contract, case, dtype) for case in contract.cases for dtype in dtypes]
    if contract.differentiable:
        found += [Check("gradient", contract, case, dtype) for case in contract.cases for dtype in dtypes]
    found += [Check("error", contract, error_case) for error_case in contract.error_cases]
    found += [Check("law", contract, law) for law in contract.laws]
    for group in ("layout", "poison") if contract.dtypes else ():
        found += [Check(group, contract, case) for case in contract.cases]
    for group in ("mutation", "again", "repeat"):
        found += [Check(group, contract, case) for case in contract.cases]
    return [*found, Check("threads", contract), Check("processes", contract)]


def claimed_cases(contract: Component, claims: Implementation, dtype: str | None, device: str) -> list[Case]:
    """The cases that are claimed in `dtype`."""
    machine = detect()
    return [one for one in contract.cases if not Check("case", contract, one, dtype).unclaimed(claims, machine, device)]


@dataclass(frozen=True)
class _Question:
    """A check on its way: what it is about, in which dtype, where."""

    contract: Component
    subject: Any
    dtype: str | None
    claims: Implementation
    trial: Trial

    def arguments(self, case: Case | None = None) -> Arguments:
        return self.trial.arguments(self.contract, case or self.subject, self.dtype)

    @property
    def differentiable(self) -> bool:
        return bool(self.contract.differentiable) and self.claims.gradient

    def assert_agrees(self, found: Any) -> None:
        assert_agrees(self.contract, found, self.subject, self.dtype, self.trial)

    def assert_gradients_agree(self, found: Gradients, kind: UpstreamKind = "random") -> None:
        assert self.dtype is not None
        assert_gradients_agree(self.contract, found, self.subject, self.dtype, self.trial, kind)

    def assert_connected(self, found: Gradients) -> None:
        """Every result that has a gradient in the oracle has one here."""
        assert self.dtype is not None
        _, truth = expected_gradients(self.contract, self.subject, self.dtype, self.trial, "random")
        cut = sorted(truth.connected - found.connected)
        assert not cut, f"{', '.join(cut)} is cut off from the graph: no gradient flows back from it"

    def upstream(self, **changes: Any) -> Upstream:
        assert self.dtype is not None
        return Upstream(self.trial.seed, self.dtype, **changes)


def _signature(question: _Question, implementation: Callable[..., Any]) -> None:
    mismatch = question.contract.signature_mismatch(implementation)
    assert mismatch is None, f"{question.contract.name}: {mismatch}"


def _case(question: _Question, implementation: Callable[..., Any]) -> None:
    found = question.contract.run(implementation, question.arguments())
    question.assert_agrees(found)


def _gradient(question: _Question, implementation: Callable[..., Any]) -> None:
    """All differentiable arguments together, and in one dtype each alone too: a backward pass must heed which gradients
    are wanted, which is known before any number is read.
    """
    contract, arguments = question.contract, question.arguments()
    present = tuple(name for name in contract.differentiable if arguments.get(name) is not None)
    alone = len(present) > 1 and question.dtype == best_dtype(contract, question.claims)
    subsets = [present, *((name,) for name in present if alone)]
    for names in subsets:
        found = gradients_of(contract, implementation, question.arguments(), question.upstream(), names)
        if names == present:
            question.assert_agrees(found.result)
            question.assert_connected(found)
        question.assert_gradients_agree(found)


def _error(question: _Question, implementation: Callable[..., Any]) -> None:
    contract, case = question.contract, question.subject
    arguments = case.arguments(question.trial.maker(dtype=question.dtype))
    # What a contract observes may need more than the parameters; bad parameters alone are refused by the call itself.
    direct = contract.observe is None or set(arguments) <= set(contract.parameters)
    try:
        result = implementation(**arguments) if direct else contract.run(implementation, arguments)
    except case.error as error:
        message = str(error)
        assert re.search(case.match, message), f"the message {message!r} does not match {case.match!r}"
        assert "\n" not in message, f"the message has more than one line: {message!r}"
    except Exception as error:
        wanted = case.error.__name__ if isinstance(case.error, type) else " or ".join(e.__name__ for e in case.error)
        raise AssertionError(
            f"raised {type(error).__name__}: {error}, expected {wanted} matching {case.match!r}"
        ) from error
    else:
        raise AssertionError(
            f"bad arguments were accepted: got a {type(result).__name__}, expected an error matching {case.match!r}"
        )


def _law(question: _Question, implementation: Callable[..., Any]) -> None:
    question.subject.check(implementation, question.trial.maker(dtype=question.dtype))


def _layout(question: _Question, implementation: Callable[..., Any]) -> None:
    """Views with unusual strides hold the same values; so do upstream gradients that are expanded or transposed.

    The first case is laid out in every way, the others take turns: strides and sizes are read apart from each other.
    """
    contract = question.contract
    ways: tuple[Layout | None, ...] = (*LAYOUTS, *((None,) if question.differentiable else ()))
    turn = contract.cases.index(question.subject)
    for layout in ways if turn == 0 else (ways[turn % len(ways)],):
        arguments = question.arguments() if layout is None else relaid(question.arguments(), layout)
        if not question.differentiable:
            question.assert_agrees(contract.run(implementation, arguments))
            continue
        upstream = question.upstream(kind="expanded" if layout is None else "random", layout=layout)
        found = gradients_of(contract, implementation, arguments, upstream)
        question.assert_agrees(found.result)
        question.assert_gradients_agree(found, upstream.kind)


def _poison(question: _Question, implementation: Callable[..., Any]) -> None:
    contract = question.contract
    with nan_in_uninitialised_memory():
        found = contract.run(implementation, question.arguments())
    question.assert_agrees(found)
    if question.differentiable:
        with nan_in_uninitialised_memory():
            gradients = gradients_of(contract, implementation, question.arguments(), question.upstream())
        question.assert_gradients_agree(gradients)


def _mutation(question: _Question, implementation: Callable[..., Any]) -> None:
    """Only what the contract says may change changes, in the backward pass too, upstream gradients included."""
    contract = question.contract

    def unchanged(arguments: Arguments, before: Any) -> None:
        for name in arguments:
            if name not in contract.mutates:
                difference = first_difference(copied(arguments[name]), before[name], name)
                assert difference is None, f"the argument was changed: {difference}"

    arguments = question.arguments()
    before = copied(arguments)
    contract.run(implementation, arguments)
    unchanged(arguments, before)
    if question.differentiable:
        sent: list[Any] = []
        upstream = _Recorded(question.trial.seed, question.dtype or "", sent=sent)
        arguments = question.arguments()
        gradients_of(contract, implementation, arguments, upstream)
        unchanged(arguments, before)
        for gradient, original in sent:
            difference = first_difference(gradient, original, "upstream gradient")
            assert difference is None, f"the backward pass changed what it was given: {difference}"


def _again(question: _Question, implementation: Callable[..., Any]) -> None:
    """A second call with other values of the same sizes: nothing may be remembered that is not in the arguments."""
    contract = question.contract
    other = _Question(contract, question.subject, question.dtype, question.claims, next_trial(question.trial))
    contract.run(implementation, question.arguments())
    other.assert_agrees(contract.run(implementation, other.arguments()))


def _repeat(question: _Question, implementation: Callable[..., Any]) -> None:
    contract = question.contract

    def once() -> Any:
        if question.differentiable:
            found = gradients_of(contract, implementation, question.arguments(), question.upstream())
            return copied((found.result, dict(found.of)))
        return copied(contract.run(implementation, question.arguments()))

    first = once()
    for _ in range(ROUNDS if question.subject is contract.cases[0] else 1):
        difference = first_difference(once(), first)
        assert difference is None, f"the same arguments gave other bits: {difference}"


def _threads(question: _Question, implementation: Callable[..., Any]) -> None:
    """Several threads run the claimed cases at once, forward and backward, each in another order.

    Every result and every gradient must agree with the oracle.
    """
    contract = question.contract
    cases = claimed_cases(contract, question.claims, question.dtype, question.trial.device)
    start = threading.Barrier(THREADS, timeout=60)

    def run(arguments: Arguments) -> Any:
        if question.differentiable:
            return gradients_of(contract, implementation, arguments, question.upstream())
        return contract.run(implementation, arguments)

    def work(offset: int) -> list[tuple[Case, Any]]:
        order = (cases * ROUNDS)[offset : offset + len(cases)]
        prepared = [(case, question.arguments(case)) for case in order]
        start.wait()
        return [(case, run(arguments)) for case, arguments in prepared]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [pool.submit(work, offset % max(len(cases), 1)) for offset in range(THREADS)]
            results = [future.result() for future in futures]
    finally:
        sys.setswitchinterval(interval)
    for case, found in (pair for result in results for pair in result):
        of_case = replace(question, subject=case)
        of_case.assert_agrees(found.result if question.differentiable else found)
        if question.differentiable:
            of_case.assert_gradients_agree(found)


def _processes(question: _Question, implementation: Callable[..., Any]) -> None:
    """Several processes run the claimed cases at once; they load the implementation themselves."""
    from .processes import judge_in_processes

    judge_in_processes(question.contract.name, question.dtype, question.trial)


@dataclass(frozen=True)
class _Recorded(Upstream):
    """An Upstream that keeps (what was sent, its copy)."""

    sent: list[Any] = ()  # type: ignore[assignment]

    def gradients(self, outputs: list[Any]) -> list[Any]:
        found = super().gradients(outputs)
        self.sent.extend((gradient, gradient.clone()) for gradient in found)
        return found


def next_trial(trial: Trial) -> Trial:
    """The trial of the next seed."""
    return replace(trial, seed=trial.seed + 1)


_RUN: dict[str, Callable[[_Question, Callable[..., Any]], None]] = {
    "signature": _signature,
    "case": _case,
    "gradient": _gradient,
    "error": _error,
    "law": _law,
    "layout": _layout,
    "poison": _poison,
    "mutation": _mutation,
    "again": _again,
    "repeat": _repeat,
    "threads": _threads,
    "processes": _processes,
}
GROUPS = tuple(_RUN)


def all_checks(contracts: Iterator[Component] | list[Component]) -> list[Check]:
    """The checks of several contracts."""
    return [check for contract in contracts for check in checks(contract)]
