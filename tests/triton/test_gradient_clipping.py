"""Gradient clipping over all tensors at once."""

from __future__ import annotations

import pytest
import torch

from cs336_registry import contract as contract_of
from cs336_registry.compare import assert_within
from cs336_registry.components.gradient_clipping import with_gradients

from .kernel_checks import BFLOAT16, DEVICE, DTYPES, maker

SHAPES = ((7, 5), (11,), (), (0, 3), (20000,))


@pytest.fixture
def gradient_clipping():
    from cs336_triton.gradient_clipping import gradient_clipping

    return gradient_clipping


def gradients(make, scale=1.0):
    return [make.normal(*shape, scale=scale) for shape in SHAPES]


def clipped(implementation, values, max_l2_norm=1.0):
    parameters = with_gradients(values, values)
    norm = implementation(parameters, max_l2_norm)
    return norm, [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("scale", [1e-4, 1.0])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(gradient_clipping, dtype, scale):
    contract = contract_of("gradient_clipping")
    values = gradients(maker(dtype), scale)
    norm, found = clipped(gradient_clipping, values)
    true_norm, truth = clipped(contract.oracle, [value.double() for value in values])
    plain_norm, plain = clipped(contract.oracle, values)
    assert_within(norm, true_norm, plain_norm, contract.tolerance, what="the norm")
    for one, true, base in zip(found, truth, plain, strict=True):
        assert_within(one, true, base, contract.tolerance)


def test_float64_stays_float64(gradient_clipping):
    values = gradients(maker("float64"))
    norm, found = clipped(gradient_clipping, values)
    expected = torch.cat([value.reshape(-1) for value in values]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    for one, value in zip(found, values, strict=True):
        torch.testing.assert_close(one, value / (expected + 1e-6), rtol=1e-14, atol=0)


def test_small_gradients_keep_their_bits(gradient_clipping):
    values = gradients(maker("float16"), 1e-3)
    _, found = clipped(gradient_clipping, values)
    for one, value in zip(found, values, strict=True):
        assert torch.equal(one, value)


def test_mixed_dtypes(gradient_clipping):
    values = [maker("float16").normal(9), maker("bfloat16").normal(4, 4), maker().normal(33)]
    norm, found = clipped(gradient_clipping, values)
    wide = torch.cat([value.double().reshape(-1) for value in values]).norm()
    torch.testing.assert_close(norm.double(), wide, rtol=1e-6, atol=0)
    for one, value in zip(found, values, strict=True):
        epsilon = torch.finfo(value.dtype).eps
        torch.testing.assert_close(one.double(), value.double() / (wide + 1e-6), rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("layout", ["transposed", "padded"])
def test_any_layout(gradient_clipping, layout):
    plain = maker().normal(6, 5)
    strided = maker(strided=True).normal(6, 5) if layout == "padded" else plain.t().contiguous().t()
    parameters = [torch.zeros(6, 5, device=DEVICE, requires_grad=True) for _ in range(2)]
    for parameter, gradient in zip(parameters, (plain, strided), strict=True):
        parameter.grad = gradient
        gradient_clipping([parameter], 0.1)
    assert torch.equal(parameters[0].grad, parameters[1].grad)
    assert parameters[1].grad.stride() == strided.stride()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_norm_that_is_not_finite_is_returned(gradient_clipping, value):
    norm, _ = clipped(gradient_clipping, [maker().tensor([1.0, value]), maker().normal(5)])
    assert not norm.isfinite()


def test_twice_the_same_bits(gradient_clipping):
    first, second = (clipped(gradient_clipping, gradients(maker())) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


def test_operators():
    from cs336_triton.gradient_clipping import _scale_operator, norm_operator

    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    values = [maker().normal(3, 2), maker().normal(5)]
    torch.library.opcheck(norm_operator, (values,), test_utils=checks)
    torch.library.opcheck(_scale_operator, (values, torch.ones((), device=DEVICE), 0.5, 1e-6), test_utils=checks)


def test_compiles_whole(gradient_clipping):
    """With autograd out of the way, as in a training step's tail."""
    torch._dynamo.reset()

    @torch.no_grad()
    def clip(*values):
        from cs336_triton.gradient_clipping import _scale_operator, norm_operator

        norm = norm_operator(list(values))
        _scale_operator(list(values), norm, 0.5, 1e-6)
        return norm

    values = [maker().normal(3, 2), maker().normal(5)]
    expected_norm, expected = clipped(gradient_clipping, values, 0.5)
    norm = torch.compile(clip, fullgraph=True, backend="aot_eager")(*values)
    assert torch.equal(norm, expected_norm)
    for one, other in zip(values, expected, strict=True):
        assert torch.equal(one, other)


def test_memory_for_graphs_is_pinned_before_they_are_captured(monkeypatch):
    from cs336_triton import multi_tensor

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda entries, *, dtype, pin_memory: empty(entries, dtype=dtype))
    monkeypatch.setattr(multi_tensor, "_pinned", [])
    monkeypatch.setattr(multi_tensor, "PINNED_ENTRIES", 10)
    for entries, expected in ((4, 10), (10, 10), (12, 12), (5, 12)):
        multi_tensor.reserve(entries)
        assert [memory.numel() for memory in multi_tensor._pinned] == [expected]


@pytest.mark.parametrize("left", [[], [100]], ids=str)
def test_a_capture_without_memory_says_what_to_do(monkeypatch, left):
    from cs336_triton import multi_tensor

    monkeypatch.setattr(multi_tensor, "_pinned", [torch.zeros(entries, dtype=torch.int64) for entries in left])
    table = torch.zeros(60, 2, dtype=torch.int64)
    message = rf"a table of 120 numbers and {sum(left)} are left.*run the step once before.*reserve\(480\)"
    with pytest.raises(RuntimeError, match=message):
        multi_tensor._on_device(table, torch.device("cuda"), capturing=True)
