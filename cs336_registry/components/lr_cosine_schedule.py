"""Learning rate with linear warm-up and cosine decay."""

from __future__ import annotations

import itertools
import math

from ..arguments import ArgumentMaker
from ..component import Arguments, Case, Component, ErrorCase, Law, Workload


def lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """The learning rate of iteration `it`: a linear rise, half a cosine down, then a constant.

    it < warmup_iters: `it / warmup_iters * max`. Up to cosine_cycle_iters:
    `min + (1 + cos(pi * (it - warmup_iters) / (cosine_cycle_iters - warmup_iters))) / 2 * (max - min)`. After: `min`.
    All counts are iterations from 0; cosine_cycle_iters counts the warm-up in. Where both are equal there is no cosine
    and the peak stands at `it == warmup_iters`.
    Raises ValueError for a negative iteration or count, a warm-up longer than the cycle, a negative rate, or a minimum
    above the maximum.
    Source: Loshchilov and Hutter 2017, "SGDR", https://arxiv.org/abs/1608.03983; Touvron et al. 2023, "LLaMA".
    """
    raise NotImplementedError


def check(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    for name, count in (("it", it), ("warmup_iters", warmup_iters), ("cosine_cycle_iters", cosine_cycle_iters)):
        if count < 0:
            raise ValueError(f"lr_cosine_schedule: {name} is {count}: iterations are counted from 0")
    if warmup_iters > cosine_cycle_iters:
        raise ValueError(
            f"lr_cosine_schedule: warmup_iters is {warmup_iters} but cosine_cycle_iters is {cosine_cycle_iters}: "
            f"the warm-up is part of the cycle, so shorten it or lengthen the cycle"
        )
    if not 0 <= min_learning_rate <= max_learning_rate < math.inf:
        raise ValueError(
            f"lr_cosine_schedule: min_learning_rate is {min_learning_rate} and max_learning_rate is "
            f"{max_learning_rate}: they must satisfy 0 <= min <= max"
        )


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    schedule = {"max_learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_iters": 7, "cosine_cycle_iters": 21}
    return {"it": 0, **schedule, **case.sizes}


def oracle(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    import numpy as np

    if it < warmup_iters:
        return float(np.interp(it, [0, warmup_iters], [0.0, max_learning_rate]))
    if it >= cosine_cycle_iters > warmup_iters or it > cosine_cycle_iters:
        return float(min_learning_rate)
    # The half-angle form of the cosine, another road to the same number.
    angle = np.pi / 2 * (it - warmup_iters) / max(cosine_cycle_iters - warmup_iters, 1)
    return float(max_learning_rate - (max_learning_rate - min_learning_rate) * np.sin(angle) ** 2)


def _close(found: float, expected: float, what: str) -> None:
    assert math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-15), f"{what}: {found!r}, expected {expected!r}"


def the_borders_meet(lr_cosine_schedule, make: ArgumentMaker) -> None:
    schedule = (3e-4, 3e-5, 100, 1100)
    for border, rate in ((0, 0.0), (100, 3e-4), (600, (3e-4 + 3e-5) / 2), (1100, 3e-5), (1101, 3e-5), (10**9, 3e-5)):
        _close(lr_cosine_schedule(border, *schedule), rate, f"iteration {border}")
    for it in range(1, 1200):
        step = abs(lr_cosine_schedule(it, *schedule) - lr_cosine_schedule(it - 1, *schedule))
        assert step <= 3e-4 / 100 * (1 + 1e-9), f"the rate jumps by {step} before iteration {it}"


def it_rises_and_falls(lr_cosine_schedule, make: ArgumentMaker) -> None:
    rates = [lr_cosine_schedule(it, 1.0, 0.1, 10, 50) for it in range(60)]
    assert all(one < later for one, later in itertools.pairwise(rates[:11])), "the warm-up does not rise"
    assert all(one > later for one, later in itertools.pairwise(rates[10:51])), "the cosine does not fall"
    assert rates[50:] == [0.1] * 10, "the rate after the cycle is not the minimum"
    for distance in range(20):
        # Half a cosine is point-symmetric about its middle.
        _close(rates[30 - distance] + rates[30 + distance], 1.1, f"the symmetry {distance} iterations from the middle")


def the_values_are_plain_floats(lr_cosine_schedule, make: ArgumentMaker) -> None:
    for it in (0, 5, 10, 30, 50, 60):
        rate = lr_cosine_schedule(it, 1.0, 0.1, 10, 50)
        assert type(rate) is float, f"iteration {it} gives a {type(rate).__name__}, which no JSON file takes"


contract = Component(
    signature=lr_cosine_schedule,
    kind="algorithm",
    summary="learning rate: linear warm-up, half a cosine down, constant",
    formula="min + ½ (1 + cos(π (it − warmup) / (cycle − warmup))) (max − min)",
    paper="https://arxiv.org/abs/1608.03983",
    arguments=arguments,
    oracle=oracle,
    cases=(
        *(Case(id=f"course_{it:02d}", sizes={"it": it}) for it in (0, 1, 6, 7, 8, 14, 20, 21, 22, 24)),
        Case(id="no_warmup_start", sizes={"it": 0, "warmup_iters": 0}),
        Case(id="no_warmup_middle", sizes={"it": 10, "warmup_iters": 0}),
        Case(id="no_cosine_peak", sizes={"it": 7, "warmup_iters": 7, "cosine_cycle_iters": 7}),
        Case(id="no_cosine_after", sizes={"it": 8, "warmup_iters": 7, "cosine_cycle_iters": 7}),
        Case(id="no_iterations", sizes={"it": 0, "warmup_iters": 0, "cosine_cycle_iters": 0}),
        Case(id="minimum_zero", sizes={"it": 21, "min_learning_rate": 0.0}),
        Case(id="long_run", sizes={"it": 123_456, "warmup_iters": 2_000, "cosine_cycle_iters": 600_000}),
    ),
    error_cases=(
        ErrorCase(
            id="negative_iteration",
            arguments=lambda make: arguments(Case(id="", sizes={"it": -1}), make),
            match="it is -1: iterations are counted from 0",
        ),
        ErrorCase(
            id="warmup_longer_than_cycle",
            arguments=lambda make: arguments(Case(id="", sizes={"warmup_iters": 22}), make),
            match="warmup_iters is 22 but cosine_cycle_iters is 21",
        ),
        ErrorCase(
            id="negative_rate",
            arguments=lambda make: arguments(Case(id="", sizes={"min_learning_rate": -0.1}), make),
            match="min_learning_rate is -0.1",
        ),
        ErrorCase(
            id="minimum_above_maximum",
            arguments=lambda make: arguments(Case(id="", sizes={"min_learning_rate": 2.0}), make),
            match="min_learning_rate is 2.0 and max_learning_rate is 1.0",
        ),
    ),
    laws=(
        Law(id="borders", statement="the pieces meet at their borders with the exact values", check=the_borders_meet),
        Law(id="shape", statement="it rises, falls symmetrically and stays", check=it_rises_and_falls),
        Law(id="float", statement="the rate is a plain float", check=the_values_are_plain_floats),
    ),
    workloads=(Workload(id="one_call", sizes={"it": 14}, flops=8.0),),
    adapter="run_get_lr_cosine_schedule",
)
