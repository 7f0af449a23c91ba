"""Comparing results with an oracle: one rule for every backend.

The error of a candidate is its root-mean-square distance from the float64 oracle. It may be at most `factor` times the
error of plain PyTorch in the same dtype, plus a floor of a few rounding errors of that dtype (see `Tolerance`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .component import Tolerance

if TYPE_CHECKING:
    import torch


def assert_within(candidate: Any, truth: Any, baseline: Any, tolerance: Tolerance, *, what: str = "result") -> None:
    """`candidate` against the float64 `truth`; `baseline` is what plain PyTorch computes in the candidate's dtype.

    Works on tensors and on nested tuples, lists and mappings of them; everything else must be equal.
    """
    import torch

    if isinstance(truth, torch.Tensor):
        _assert_tensor_within(candidate, truth, baseline, tolerance, what)
    elif isinstance(truth, Mapping):
        assert list(candidate) == list(truth), f"{what}: keys are {list(candidate)}, expected {list(truth)}"
        for key in truth:
            assert_within(candidate[key], truth[key], baseline[key], tolerance, what=f"{what}[{key!r}]")
    elif isinstance(truth, tuple | list):
        assert len(candidate) == len(truth), f"{what}: has {len(candidate)} parts, expected {len(truth)}"
        for index, (one, true, base) in enumerate(zip(candidate, truth, baseline, strict=True)):
            assert_within(one, true, base, tolerance, what=f"{what}[{index}]")
    elif isinstance(truth, float):
        assert math.isclose(candidate, truth, rel_tol=1e-6), f"{what}: {candidate!r}, expected {truth!r}"
    else:
        assert candidate == truth, f"{what}: {_short(candidate)}, expected {_short(truth)}"


def assert_nearly_equal(
    one: torch.Tensor, other: torch.Tensor, *, roundings: float = 16.0, what: str = "result"
) -> None:
    """Two tensors that a law says are equal, up to `roundings` rounding errors of the coarser dtype."""
    import torch

    assert one.shape == other.shape, f"{what}: shape {tuple(one.shape)}, expected {tuple(other.shape)}"
    epsilon = max(rounding_error(one.dtype), rounding_error(other.dtype))
    one64, other64 = one.detach().to("cpu", torch.float64), other.detach().to("cpu", torch.float64)
    same_infinities = torch.isinf(one64) & (one64 == other64)
    distance = root_mean_square(torch.where(same_infinities, 0.0, one64 - other64))
    scale = max(root_mean_square(torch.where(torch.isinf(other64), 0.0, other64)), 1.0)
    assert distance <= roundings * epsilon * scale, (
        f"{what}: off by {distance:.3g}, at most {roundings * epsilon * scale:.3g}"
    )


def rounding_error(dtype: torch.dtype) -> float:
    """Half the gap between 1 and the next number of `dtype`; 0 for integers and booleans."""
    import torch

    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0


def root_mean_square(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt()) if values.numel() else 0.0


def _assert_tensor_within(
    candidate: Any, truth: torch.Tensor, baseline: torch.Tensor, tolerance: Tolerance, what: str
) -> None:
    import torch

    assert isinstance(candidate, torch.Tensor), f"{what}: is a {type(candidate).__name__}, expected a tensor"
    assert candidate.shape == truth.shape, f"{what}: shape {tuple(candidate.shape)}, expected {tuple(truth.shape)}"
    if not truth.dtype.is_floating_point:
        assert torch.equal(candidate.cpu(), truth.cpu()), (
            f"{what}: integers differ: {_short(candidate)}, expected {_short(truth)}"
        )
        return
    assert candidate.dtype == baseline.dtype, f"{what}: dtype {candidate.dtype}, expected {baseline.dtype}"
    found, expected, plain = (tensor.detach().to("cpu", torch.float64) for tensor in (candidate, truth, baseline))
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(found), finite) or _overflows(found, plain), (
        f"{what}: {int((torch.isfinite(found) != finite).sum())} of {found.numel()} entries are NaN or infinite where "
        f"the oracle is finite, or the other way round"
    )
    usable = finite & torch.isfinite(found) & torch.isfinite(plain)
    found, expected, plain = found[usable], expected[usable], plain[usable]
    error, plain_error = root_mean_square(found - expected), root_mean_square(plain - expected)
    allowed = tolerance.factor * plain_error + tolerance.floor * rounding_error(candidate.dtype) * root_mean_square(
        expected
    )
    # A tensor of exact zeros leaves no scale: the smallest normal number of the dtype stands in for it.
    allowed += torch.finfo(candidate.dtype).tiny
    allowed += tolerance.absolute * rounding_error(torch.promote_types(candidate.dtype, torch.float32))
    allowed += tolerance.stored * rounding_error(candidate.dtype)
    assert error <= allowed, (
        f"{what}: error {error:.3g} against float64, allowed {allowed:.3g} "
        f"({tolerance.factor:g} x plain PyTorch's {plain_error:.3g} in {candidate.dtype}, "
        f"plus {tolerance.floor:g} roundings)"
    )


def _overflows(found: torch.Tensor, plain: torch.Tensor) -> bool:
    """Entries beyond the dtype's range may be infinite where plain PyTorch's are infinite too."""
    import torch

    return torch.equal(torch.isfinite(found), torch.isfinite(plain)) and not bool(torch.isnan(found).any())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
