"""The output projection and its cross entropy, chunk by chunk."""

from __future__ import annotations

import pytest
import torch

from .kernel_checks import (
    BFLOAT16,
    DTYPES,
    check_against_float64,
    check_backward_makes_no_zeros,
    check_gradients_numerically,
    check_operator,
    maker,
)

REDUCTIONS = ("mean", "none", "sum")


@pytest.fixture
def linear_cross_entropy():
    from cs336_triton.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks and a last one that is not full, at sizes a test can afford."""
    import cs336_triton.linear_cross_entropy as module

    monkeypatch.setattr(module, "chunk_rows", lambda n_rows, vocab, itemsize: 4)


def arguments(make, rows, d_model, vocab, reduction="mean", *, scale=1.0):
    return {
        "x": make.normal(*rows, d_model, scale=scale),
        "weight": make.normal(vocab, d_model, scale=d_model**-0.5),
        "targets": make.integers(*rows, high=vocab),
        "reduction": reduction,
    }


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("vocab", [63, 1000])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(linear_cross_entropy, dtype, vocab, reduction):
    given = arguments(maker(dtype), (3, 3), 33, vocab, reduction)
    check_against_float64("linear_cross_entropy", linear_cross_entropy, given)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float64_stays_float64(linear_cross_entropy, reduction):
    given = arguments(maker("float64"), (3, 3), 33, 63, reduction)
    check_against_float64("linear_cross_entropy", linear_cross_entropy, given)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strided_targets_and_expanded_gradients(linear_cross_entropy, reduction):
    given = arguments(maker(), (2, 7), 5, 23, reduction)
    strided = given["targets"].t().contiguous().t()[:, ::2]
    x, weight = given["x"][:, ::2].detach().requires_grad_(), given["weight"].requires_grad_()
    gradients = []
    for targets in (strided, strided.contiguous()):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
        # The gradient of a sum is one number, expanded: its strides are 0.
        gradients.append(torch.autograd.grad(loss.sum(), [x, weight]))
    expected = torch.nn.functional.cross_entropy((x @ weight.T).flatten(0, 1), strided.flatten(), reduction=reduction)
    for found, again, wanted in zip(*gradients, torch.autograd.grad(expected.sum(), [x, weight]), strict=True):
        assert torch.equal(found, again)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rows", [(), (1,), (33,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_leading_dimensions(linear_cross_entropy, rows, reduction):
    check_against_float64("linear_cross_entropy", linear_cross_entropy, arguments(maker(), rows, 8, 37, reduction))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_no_rows(linear_cross_entropy, reduction):
    check_against_float64("linear_cross_entropy", linear_cross_entropy, arguments(maker(), (0,), 8, 37, reduction))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padded_strides(linear_cross_entropy, reduction):
    given = arguments(maker(strided=True), (3, 3), 33, 63, reduction)
    check_against_float64("linear_cross_entropy", linear_cross_entropy, given)


@pytest.mark.usefixtures("small_chunks")
def test_large_logits(linear_cross_entropy):
    given = arguments(maker(), (7,), 16, 63, scale=1e3)
    check_against_float64("linear_cross_entropy", linear_cross_entropy, given)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("wanted", ["x", "weight", "neither"])
def test_only_wanted_gradients(linear_cross_entropy, wanted, reduction):
    given = arguments(maker(), (7,), 16, 63, reduction)
    both = {key: given[key].detach().requires_grad_() for key in ("x", "weight")}
    complete = linear_cross_entropy(**(given | both))
    expected = dict(zip(both, torch.autograd.grad(complete.sum(), list(both.values())), strict=True))
    if wanted == "neither":
        assert torch.equal(linear_cross_entropy(**given), complete)
        with torch.no_grad():
            assert not linear_cross_entropy(**(given | both)).requires_grad
        return
    leaf = given[wanted].detach().requires_grad_()
    (found,) = torch.autograd.grad(linear_cross_entropy(**(given | {wanted: leaf})).sum(), leaf)
    assert torch.equal(found, expected[wanted])


@pytest.mark.usefixtures("small_chunks")
def test_backward_twice(linear_cross_entropy):
    """The kept gradients are read, not scaled in place."""
    given = arguments(maker(), (7,), 16, 63)
    leaf = given["weight"].requires_grad_()
    loss = linear_cross_entropy(**given)
    (once,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(3 * loss, leaf)
    assert torch.equal(once, twice)


@pytest.mark.parametrize(
    ("n_rows", "vocab", "itemsize"), [(1, 50, 2), (8192, 128256, 2), (8192, 50257, 4), (100_000, 10**6, 4), (0, 10, 2)]
)
def test_chunks_are_full_products_of_bounded_size(n_rows, vocab, itemsize):
    from cs336_triton.linear_cross_entropy import CHUNK_BYTES, FEWEST_CHUNK_ROWS, MOST_CHUNK_ROWS, chunk_rows

    rows = chunk_rows(n_rows, vocab, itemsize)
    assert 128 <= rows <= MOST_CHUNK_ROWS and rows % 128 == 0
    assert rows <= FEWEST_CHUNK_ROWS or rows * vocab * itemsize <= CHUNK_BYTES + 128 * vocab * itemsize
    chunks = -(-n_rows // rows)
    assert chunks == 0 or n_rows - (chunks - 1) * rows > 0


def test_logits_are_never_whole(linear_cross_entropy, monkeypatch):
    """No tensor of rows x vocab is ever made, forward or backward."""
    import cs336_triton.linear_cross_entropy as module

    monkeypatch.setattr(module, "chunk_rows", lambda n_rows, vocab, itemsize: 4)
    sizes = []
    empty = torch.empty

    def recorded(*shape, **keywords):
        tensor = empty(*shape, **keywords)
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", recorded)
    given = arguments(maker(), (40,), 3, 200)
    loss = linear_cross_entropy(
        **(given | {"x": given["x"].requires_grad_(), "weight": given["weight"].requires_grad_()})
    )
    loss.backward()
    assert max(sizes) == 4 * 208, "a chunk of 4 rows, each padded to a multiple of 16"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_makes_no_zeros(linear_cross_entropy, reduction):
    given = arguments(maker(), (7,), 16, 63, reduction)
    leaves = [given[name].requires_grad_() for name in ("x", "weight")]
    check_backward_makes_no_zeros(linear_cross_entropy(**given), leaves)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_operator(reduction):
    from cs336_triton.linear_cross_entropy import _operator

    given = arguments(maker(), (5,), 4, 9)
    x, weight = given["x"].requires_grad_(), given["weight"].requires_grad_()
    check_operator(_operator, (x, weight, given["targets"], reduction, True, True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles_whole(linear_cross_entropy, reduction):
    given = arguments(maker(), (5,), 4, 9, reduction)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (linear_cross_entropy, compiled):
        leaves = {key: given[key].detach().requires_grad_() for key in ("x", "weight")}
        loss = call(**(given | leaves)).square().sum()
        gradients.append(torch.autograd.grad(loss, list(leaves.values())))
    for plain, traced in zip(*gradients, strict=True):
        assert torch.equal(plain, traced)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(linear_cross_entropy, reduction):
    given = arguments(maker(), (5,), 3, 7)
    check_gradients_numerically(
        lambda x, weight: linear_cross_entropy(x, weight, given["targets"], reduction=reduction),
        given["x"],
        given["weight"],
    )
