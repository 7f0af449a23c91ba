"""The rotation of q and k in one launch."""

from __future__ import annotations

import pytest
import torch

from cs336_registry.components.rope import rotation_tables

from .kernel_checks import (
    BFLOAT16,
    DEVICE,
    DTYPES,
    check_against_float64,
    check_gradients_numerically,
    check_operator,
    maker,
)

MAX_SEQ_LEN = 50


@pytest.fixture
def rope():
    from cs336_triton.rope import rope

    return rope


def arguments(make, q_shape, k_shape, positions_shape=None):
    cos, sin = rotation_tables(q_shape[-1], MAX_SEQ_LEN, 10000.0, DEVICE)
    return {
        "q": make.normal(*q_shape),
        "k": None if k_shape is None else make.normal(*k_shape),
        "cos": cos,
        "sin": sin,
        "token_positions": None if positions_shape is None else make.integers(*positions_shape, high=MAX_SEQ_LEN),
    }


@pytest.mark.parametrize("d_head", [2, 6, 16, 64])
@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
def test_matches_float64(rope, dtype, d_head):
    check_against_float64("rope", rope, arguments(maker(dtype), (2, 6, 11, d_head), (2, 1, 11, d_head), (11,)))


def test_float64_stays_float64(rope):
    check_against_float64("rope", rope, arguments(maker("float64"), (2, 3, 11, 8), (2, 3, 11, 8), (11,)))


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "positions_shape"),
    [
        ((11, 8), (11, 8), None),
        ((11, 8), (11, 8), (11,)),
        ((4, 11, 8), (4, 11, 8), (4, 11)),
        ((4, 11, 8), (2, 11, 8), (11,)),
        ((2, 3, 11, 8), (2, 1, 11, 8), None),
        ((2, 3, 11, 8), (2, 1, 11, 8), (2, 11)),
        ((2, 3, 11, 8), (2, 1, 11, 8), (2, 1, 11)),
        ((2, 3, 11, 8), (2, 3, 11, 8), (2, 3, 11)),
        ((2, 3, 11, 8), (2, 3, 11, 8), (1, 3, 11)),
        ((2, 3, 11, 8), None, (2, 11)),
        ((2, 2, 3, 11, 8), (2, 2, 1, 11, 8), (2, 2, 11)),
        ((2, 2, 3, 11, 8), (2, 2, 1, 11, 8), (2, 11)),
        ((2, 3, 11, 8), (3, 11, 8), (11,)),
        ((2, 3, 1, 8), (2, 3, 1, 8), (2, 1)),
        ((0, 3, 11, 8), (0, 1, 11, 8), None),
        ((2, 3, 0, 8), (2, 3, 0, 8), None),
    ],
    ids=str,
)
def test_shapes_and_positions(rope, q_shape, k_shape, positions_shape):
    check_against_float64("rope", rope, arguments(maker(), q_shape, k_shape, positions_shape))


def test_padded_strides(rope):
    check_against_float64("rope", rope, arguments(maker(strided=True), (2, 3, 11, 8), (2, 1, 11, 8), (2, 11)))


def test_transposed_views_are_neither_copied_nor_reordered(rope):
    """(batch, seq, heads, d_head) read as (batch, heads, seq, d_head), as attention layers do."""
    given = arguments(maker(), (2, 11, 3, 8), (2, 11, 1, 8))
    given["q"], given["k"] = given["q"].transpose(1, 2), given["k"].transpose(1, 2)
    check_against_float64("rope", rope, given)
    q, k = rope(**given)
    assert q.stride() == given["q"].stride() and k.stride() == given["k"].stride()


def test_strided_features(rope):
    """Features that are not beside each other are copied together, and the results still reach the caller."""
    given = arguments(maker(), (2, 3, 11, 8), (2, 1, 11, 8))
    given["q"], given["k"] = (given[name].mT.contiguous().mT for name in ("q", "k"))
    check_against_float64("rope", rope, given)


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_is_not_used_has_no_gradient(rope, used):
    given = arguments(maker(), (2, 3, 5, 8), (2, 1, 5, 8))
    leaves = [given["q"].requires_grad_(), given["k"].requires_grad_()]
    results = rope(**given)
    # A rotation keeps lengths, so that the gradient of half the squares is the input itself.
    found = torch.autograd.grad(results[used].square().sum() / 2, leaves, allow_unused=True)
    torch.testing.assert_close(found[used], leaves[used])
    assert found[1 - used] is None


@pytest.mark.skipif(DEVICE == "cpu", reason="on the CPU the contract refuses the position before a kernel runs")
def test_a_position_outside_the_tables_is_nan(rope):
    given = arguments(maker(), (1, 1, 3, 8), None)
    result, _ = rope(**(given | {"token_positions": torch.tensor([0, MAX_SEQ_LEN, -1], device=DEVICE)}))
    assert result.isnan().all(-1).tolist() == [[[False, True, True]]]


@pytest.mark.parametrize("with_k", [False, True])
def test_operator(with_k):
    from cs336_triton.rope import _operator

    given = arguments(maker(), (2, 3, 5, 8), (2, 1, 5, 8), (2, 5))
    q, k = given["q"].requires_grad_(), given["k"].requires_grad_()
    check_operator(_operator, (q, k if with_k else None, given["cos"], given["sin"], given["token_positions"]))


def test_compiles_whole(rope):
    given = arguments(maker(), (2, 3, 5, 8), (2, 1, 5, 8), (2, 5))
    q, k = given.pop("q"), given.pop("k")
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k: rope(q, k, **given), fullgraph=True, backend="aot_eager")
    for plain, traced in zip(rope(q, k, **given), compiled(q, k), strict=True):
        assert torch.equal(plain, traced)


def test_gradcheck(rope):
    given = arguments(maker(), (1, 2, 3, 4), (1, 1, 3, 4), (1, 3))
    q, k = given.pop("q"), given.pop("k")
    check_gradients_numerically(lambda q, k: rope(q, k, **given), q, k)
