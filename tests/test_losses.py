"""The losses where the area "nn_utils" does not look: the fused projection, wanted gradients, whole training curves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from .support import device_of, normal, properties, skip_without_float64


@pytest.fixture
def device(cs336_backend):
    return device_of(cs336_backend, "linear_cross_entropy")


def problem(rows, d_model, vocab, device, seed=0, dtype=torch.float32):
    x = normal(rows, d_model, seed=seed, device=device, dtype=dtype).requires_grad_()
    weight = normal(vocab, d_model, seed=seed + 1, device=device, dtype=dtype, scale=d_model**-0.5).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed)).to(device)
    return x, weight, targets


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_linear_cross_entropy(implementation_of, device, reduction):
    x, weight, targets = problem(13, 24, 37, device)
    found = implementation_of("linear_cross_entropy")(x, weight, targets, reduction=reduction)
    expected = F.cross_entropy(x @ weight.T, targets, reduction=reduction)
    torch.testing.assert_close(found, expected)
    upstream = normal(*expected.shape, seed=3, device=device)
    gradients = (torch.autograd.grad(loss, (x, weight), upstream) for loss in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_linear_cross_entropy_gradcheck(implementation_of, cs336_backend, device):
    loss = implementation_of("linear_cross_entropy")
    skip_without_float64(cs336_backend, "linear_cross_entropy")
    x, weight, targets = problem(3, 4, 5, device, dtype=torch.float64)
    for reduction in ("mean", "none", "sum"):
        assert torch.autograd.gradcheck(
            lambda x, weight, reduction=reduction: loss(x, weight, targets, reduction=reduction), (x, weight)
        )


@properties
@given(rows=st.integers(1, 9), d_model=st.integers(1, 40), vocab=st.integers(1, 70), seed=st.integers(0, 1000))
def test_linear_cross_entropy_is_both_in_one(implementation_of, device, rows, d_model, vocab, seed):
    x, weight, targets = problem(rows, d_model, vocab, device, seed)
    found = implementation_of("linear_cross_entropy")(x, weight, targets)
    torch.testing.assert_close(found, F.cross_entropy(x @ weight.T, targets), rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_wanted(implementation_of, device):
    x, weight, targets = problem(6, 8, 11, device)
    implementation_of("linear_cross_entropy")(x.detach(), weight, targets).backward()
    assert weight.grad is not None and x.grad is None
    frozen = weight.detach()
    implementation_of("linear_cross_entropy")(x, frozen, targets).backward()
    assert x.grad is not None and frozen.grad is None
    with torch.no_grad():
        assert not implementation_of("linear_cross_entropy")(x, weight, targets).requires_grad


def test_a_classifier_learns_the_same_way(implementation_of, device):
    """Thirty steps of SGD through each loss: whole curves agree, not only one gradient."""

    def curve(loss):
        x, weight, targets = problem(64, 16, 20, device, seed=5)
        x, weight = x.detach(), weight.detach().requires_grad_()
        losses = []
        for _ in range(30):
            value = loss(x, weight, targets)
            (gradient,) = torch.autograd.grad(value, weight)
            weight = (weight - gradient).detach().requires_grad_()
            losses.append(float(value.detach()))
        return losses

    cross_entropy, fused = implementation_of("cross_entropy"), implementation_of("linear_cross_entropy")
    expected = curve(lambda x, weight, targets: F.cross_entropy(x @ weight.T, targets))
    assert expected[-1] < 0.5 * expected[0]
    assert curve(lambda x, weight, targets: cross_entropy(x @ weight.T, targets)) == pytest.approx(expected, rel=1e-4)
    assert curve(fused) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("component", ["cross_entropy", "linear_cross_entropy"])
def test_targets_outside_the_vocabulary_are_refused_on_the_cpu(implementation_of, device, component):
    loss = implementation_of(component)
    if device != "cpu":
        pytest.skip("on a GPU looking at the targets would wait for the device")
    x, weight, targets = problem(3, 5, 7, device)
    targets[1] = -100
    arguments = (x @ weight.T, targets) if component == "cross_entropy" else (x, weight, targets)
    with pytest.raises(ValueError, match=rf"{component}: targets contains -100, outside 0\.\.6"):
        loss(*arguments)
