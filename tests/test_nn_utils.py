"""Area "nn_utils": softmax, cross entropy and gradient clipping against torch.nn.functional and torch.nn.utils."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from .support import device_of, normal, properties, skip_without_float64


@pytest.fixture
def device(cs336_backend):
    return device_of(cs336_backend, "softmax")


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax(implementation_of, device, dim):
    softmax = implementation_of("softmax")
    x = normal(5, 7, 11, device=device).requires_grad_()
    upstream = normal(5, 7, 11, seed=1, device=device)
    found, expected = softmax(x, dim), F.softmax(x, dim)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(result, x, upstream) for result in (found, expected)))


def test_softmax_of_large_scores(implementation_of, device):
    x = normal(4, 9, device=device)
    torch.testing.assert_close(implementation_of("softmax")(x + 100), F.softmax(x, -1), rtol=1e-4, atol=1e-6)
    assert torch.isfinite(implementation_of("softmax")(x * 1e30)).all()


def test_softmax_gradcheck(implementation_of, cs336_backend, device):
    softmax = implementation_of("softmax")
    skip_without_float64(cs336_backend, "softmax")
    x = normal(3, 5, device=device, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(softmax, (x,))


@properties
@given(rows=st.integers(1, 5), columns=st.integers(1, 70), shift=st.integers(-64, 64), seed=st.integers(0, 1000))
def test_softmax_knows_differences_alone(implementation_of, device, rows, columns, shift, seed):
    softmax = implementation_of("softmax")
    x = (normal(rows, columns, seed=seed, device=device) * 64).round() / 64
    torch.testing.assert_close(softmax(x + shift), softmax(x), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_cross_entropy(implementation_of, device, reduction, scale):
    cross_entropy = implementation_of("cross_entropy")
    logits = normal(8, 17, device=device, scale=scale).requires_grad_()
    targets = torch.arange(8, device=device) * 2
    found = cross_entropy(logits, targets, reduction=reduction)
    expected = F.cross_entropy(logits, targets, reduction=reduction)
    torch.testing.assert_close(found, expected)
    upstream = normal(*expected.shape, seed=1, device=device)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, upstream) for loss in (found, expected)))


def test_cross_entropy_gradcheck(implementation_of, cs336_backend, device):
    cross_entropy = implementation_of("cross_entropy")
    skip_without_float64(cs336_backend, "cross_entropy")
    logits = normal(2, 3, 5, device=device, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]], device=device)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (logits,))


@properties
@given(vocab=st.integers(1, 50), seed=st.integers(0, 1000))
def test_cross_entropy_of_equal_logits_is_the_log_of_the_vocabulary(implementation_of, device, vocab, seed):
    targets = torch.randint(vocab, (3,), generator=torch.Generator().manual_seed(seed)).to(device)
    loss = implementation_of("cross_entropy")(torch.full((3, vocab), 7.0, device=device), targets)
    torch.testing.assert_close(loss, torch.tensor(float(vocab), device=device).log(), rtol=1e-5, atol=1e-5)


def parameters(device, scale=1.0):
    shapes = ((5, 5), (3,), (2, 3, 4), (1,))
    found = [torch.nn.Parameter(normal(*shape, seed=seed, device=device)) for seed, shape in enumerate(shapes)]
    for seed, parameter in enumerate(found[:-1]):
        parameter.grad = normal(*parameter.shape, seed=seed + 10, device=device, scale=scale)
    found[1].requires_grad_(False)
    return found  # the last one has no gradient


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_gradient_clipping(implementation_of, device, scale):
    found, expected = parameters(device, scale), parameters(device, scale)
    norm = implementation_of("gradient_clipping")(found, 0.01)
    expected_norm = torch.nn.utils.clip_grad_norm_(expected, 0.01)
    torch.testing.assert_close(norm.float(), expected_norm.float())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other), "clipping must not touch the parameters"
        if other.grad is None:
            assert one.grad is None
        else:
            torch.testing.assert_close(one.grad, other.grad)


@properties
@given(limit=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_clipping_bounds_the_norm_and_keeps_the_direction(implementation_of, device, limit, seed):
    found = [torch.nn.Parameter(normal(7, 3, seed=seed, device=device)) for _ in range(2)]
    for index, parameter in enumerate(found):
        parameter.grad = normal(7, 3, seed=seed + index, device=device)
    before = torch.cat([parameter.grad.flatten().clone() for parameter in found])
    implementation_of("gradient_clipping")(found, limit)
    after = torch.cat([parameter.grad.flatten() for parameter in found])
    assert after.norm() <= min(limit, float(before.norm())) * (1 + 1e-5)
    torch.testing.assert_close(after / after.norm(), before / before.norm())
