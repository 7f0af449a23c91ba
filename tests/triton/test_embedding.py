"""The embedding's lookup and its deterministic gradient."""

from __future__ import annotations

import pytest
import torch

from .kernel_checks import (
    BFLOAT16,
    DEVICE,
    DTYPES,
    check_against_float64,
    check_gradients_numerically,
    check_operator,
    maker,
)


@pytest.fixture
def embedding():
    from cs336_triton.embedding import embedding

    return embedding


def arguments(make, shape, vocab, d_model):
    return {"token_ids": make.integers(*shape, high=vocab), "weight": make.normal(vocab, d_model)}


@pytest.mark.parametrize("d_model", [1, 63, 300, 760, 1100])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(embedding, dtype, d_model):
    check_against_float64("embedding", embedding, arguments(maker(dtype), (3, 5), 11, d_model))


def test_float64_stays_float64(embedding):
    check_against_float64("embedding", embedding, arguments(maker("float64"), (40,), 5, 9))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3, 4)], ids=str)
def test_any_shape(embedding, shape):
    check_against_float64("embedding", embedding, arguments(maker(), shape, 7, 9))


@pytest.mark.parametrize(
    ("length", "d_model"), [(length, 300) for length in (15, 16, 17, 64, 65, 200)] + [(8, 1024), (9, 1030)], ids=str
)
def test_runs_around_a_tile_of_rows(embedding, length, d_model):
    """One token many times: its run ends before, at and after the end of a tile, and before another token's."""
    given = arguments(maker("float16"), (length + 3,), 3, d_model)
    given["token_ids"][:length] = 1
    given["token_ids"][length:] = 2
    check_against_float64("embedding", embedding, given)


def test_rows_without_a_token_have_gradient_zero(embedding):
    weight = maker().normal(9, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(embedding(torch.tensor([3, 3, 8], device=DEVICE), weight).sum(), weight)
    assert gradient.sum(1).tolist() == [0, 0, 0, 10, 0, 0, 0, 0, 5]


def test_padded_strides(embedding):
    check_against_float64("embedding", embedding, arguments(maker(strided=True), (3, 5), 11, 63))


def test_strided_token_ids(embedding):
    given = arguments(maker(), (4, 6), 11, 5)
    check_against_float64("embedding", embedding, given | {"token_ids": given["token_ids"].t()[::2]})


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU the contract refuses the id before a kernel runs")
def test_an_id_outside_the_vocabulary_is_nan(embedding):
    weight = maker().normal(4, 5).requires_grad_()
    result = embedding(torch.tensor([0, 4, -1], device=DEVICE), weight)
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    assert result.isnan().all(-1).tolist() == [False, True, True] and gradient.sum().item() == 5


def test_operator():
    from cs336_triton.embedding import _operator

    given = arguments(maker(), (3, 2), 7, 5)
    check_operator(_operator, (given["token_ids"], given["weight"].requires_grad_()))


def test_compiles_whole(embedding):
    given = arguments(maker(), (3, 2), 7, 5)
    torch._dynamo.reset()
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (embedding, compiled):
        weight = given["weight"].detach().requires_grad_()
        gradients.append(torch.autograd.grad(call(given["token_ids"], weight).square().sum(), weight)[0])
    assert torch.equal(*gradients)


def test_gradcheck(embedding):
    given = arguments(maker(), (3, 2), 4, 3)
    check_gradients_numerically(lambda weight: embedding(given["token_ids"], weight), given["weight"])
