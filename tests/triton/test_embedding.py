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


@pytest.mark.parametrize("before", [0, 1, 31, 33], ids=lambda count: f"from_{count}")
@pytest.mark.parametrize("length", [4, 31, 32, 33, 63, 64, 200])
def test_runs_around_chunks(embedding, length, before):
    """One token many times: its run begins and ends before, at and after the ends of chunks."""
    given = arguments(maker("float16"), (before + length + 3,), 3, 7)
    given["token_ids"][:before] = 0
    given["token_ids"][before : before + length] = 1
    given["token_ids"][before + length :] = 2
    check_against_float64("embedding", embedding, given)


@pytest.mark.parametrize("before", [5, 1030])
def test_a_token_tens_of_thousands_of_times(embedding, before):
    """Chunks of chunks. Numbers that are whole in float32 make every order of additions equally right."""
    length = 2**15 + 70
    order = torch.randperm(before + length + 9, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0] * before + [2] * length + [1] * 9)[order].to(DEVICE)
    weight = torch.zeros(4, 2, device=DEVICE, requires_grad=True)
    grad = maker().integers(len(ids), 2, low=-8, high=9).float()
    (found,) = torch.autograd.grad(embedding(ids, weight), weight, grad)
    assert torch.equal(found, torch.zeros_like(weight).index_add(0, ids, grad))


def test_a_text_gives_the_same_bits_twice(embedding):
    """Tokens as often as in a text, in the order of a text: sums that round, every time in the same way."""
    generator = torch.Generator().manual_seed(0)
    ids = (50 ** torch.rand(3000, generator=generator) - 1).long().to(DEVICE)
    assert ids.bincount().max() > 500
    check_against_float64("embedding", embedding, {"token_ids": ids, "weight": maker("float16").normal(50, 5)})


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
