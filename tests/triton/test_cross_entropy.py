"""Cross entropy's kernels."""

from __future__ import annotations

import pytest
import torch

from .kernel_checks import (
    BFLOAT16,
    DEVICE,
    DTYPES,
    check_against_float64,
    check_backward_makes_no_zeros,
    check_gradients_numerically,
    check_operator,
    maker,
)

REDUCTIONS = ("mean", "none", "sum")


@pytest.fixture
def cross_entropy():
    from cs336_triton.cross_entropy import cross_entropy

    return cross_entropy


def arguments(make, rows, vocab, reduction="mean", *, scale=3.0, mean=0.0):
    return {
        "logits": make.normal(*rows, vocab, scale=scale, mean=mean),
        "targets": make.integers(*rows, high=vocab),
        "reduction": reduction,
    }


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("vocab", [1, 63, 1000, 5003])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(cross_entropy, dtype, vocab, reduction):
    check_against_float64("cross_entropy", cross_entropy, arguments(maker(dtype), (3, 5), vocab, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float64_stays_float64(cross_entropy, reduction):
    check_against_float64("cross_entropy", cross_entropy, arguments(maker("float64"), (5,), 63, reduction))


@pytest.mark.parametrize("rows", [(), (1,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_leading_dimensions(cross_entropy, rows, reduction):
    check_against_float64("cross_entropy", cross_entropy, arguments(maker(), rows, 37, reduction))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_no_rows(cross_entropy, reduction):
    check_against_float64("cross_entropy", cross_entropy, arguments(maker(), (0, 3), 37, reduction))


def test_the_mean_of_no_rows_is_nan(cross_entropy):
    logits = maker().normal(0, 5).requires_grad_()
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.shape == (0, 5)


def test_padded_strides(cross_entropy):
    check_against_float64("cross_entropy", cross_entropy, arguments(maker(strided=True), (3, 5), 63))


def test_transposed_logits(cross_entropy):
    """(batch, vocab, seq) read as (batch, seq, vocab)."""
    given = arguments(maker(), (3, 5), 63)
    given["logits"] = given["logits"].transpose(1, 2).contiguous().transpose(1, 2)
    check_against_float64("cross_entropy", cross_entropy, given)


@pytest.mark.parametrize("vocab", [63, 5003])
def test_large_logits(cross_entropy, vocab):
    check_against_float64("cross_entropy", cross_entropy, arguments(maker(), (7,), vocab, mean=1e4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_of_any_integer_type(cross_entropy, dtype):
    given = arguments(maker(), (3, 5), 63)
    expected = cross_entropy(**given)
    assert torch.equal(expected, cross_entropy(**(given | {"targets": given["targets"].to(dtype)})))


def test_impossible_entries(cross_entropy):
    """-inf says that an entry can't occur: it takes part in nothing and gets no gradient."""
    given = arguments(maker(), (3,), 5000)
    given["logits"][:, 10:4990] = -float("inf")
    given["targets"][:] = 3
    loss = cross_entropy(given["logits"].requires_grad_(), given["targets"])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(given["logits"], given["targets"]))
    (gradient,) = torch.autograd.grad(loss, given["logits"])
    assert (gradient[:, 10:4990] == 0).all() and gradient.isfinite().all()


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU the contract refuses the target before a kernel runs")
def test_a_target_outside_the_vocabulary_is_nan(cross_entropy):
    logits = maker().normal(3, 5).requires_grad_()
    losses = cross_entropy(logits, torch.tensor([0, 5, -100], device=DEVICE), reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isnan().tolist() == [False, True, True] and gradient.isnan().all(-1).tolist() == [False, True, True]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_makes_no_zeros(cross_entropy, reduction):
    given = arguments(maker(), (5,), 63, reduction)
    leaf = given["logits"].requires_grad_()
    check_backward_makes_no_zeros(cross_entropy(**given), [leaf])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operator(reduction):
    from cs336_triton.cross_entropy import _operator

    given = arguments(maker(), (3,), 9)
    check_operator(_operator, (given["logits"].requires_grad_(), given["targets"], reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_whole(cross_entropy, reduction):
    given = arguments(maker(), (3,), 9, reduction)
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (cross_entropy, compiled):
        logits = given["logits"].detach().requires_grad_()
        gradients.append(
            torch.autograd.grad(call(logits, given["targets"], reduction=reduction).square().sum(), logits)
        )
    assert torch.equal(gradients[0][0], gradients[1][0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(cross_entropy, reduction):
    given = arguments(maker(), (3,), 7)
    check_gradients_numerically(
        lambda logits: cross_entropy(logits, given["targets"], reduction=reduction), given["logits"]
    )
