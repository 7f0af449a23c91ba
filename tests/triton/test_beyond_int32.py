"""Tensors of more than 2³¹ elements: the last rows are as right as the first. Needs a GPU with 40 GB."""

from __future__ import annotations

import pytest
import torch

import cs336_registry as registry
from cs336_registry.compare import assert_within

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40e9,
    reason="2**31 bfloat16 numbers, their gradient and their result need a GPU with 40 GB",
)

ENDS = (slice(None, 3), slice(-3, None))


def check_ends(name: str, implementation, tensors: dict[str, torch.Tensor], rows: tuple[str, ...], **options) -> None:
    """The first and the last rows of values and gradients, against the contract's oracle on those rows alone."""
    contract = registry.contract(name)
    leaves = {key: tensor.requires_grad_(tensor.is_floating_point()) for key, tensor in tensors.items()}
    result = implementation(**leaves, **options)
    found = dict(zip(rows, torch.autograd.grad(result, [leaves[row] for row in rows], result.detach()), strict=True))
    for end in ENDS:
        parts = {
            key: tensor.detach()[end] if tensor.ndim > 1 or key == "targets" else tensor.detach()
            for key, tensor in tensors.items()
        }
        expected = []
        for dtype in (torch.float64, torch.bfloat16):
            inputs = {
                key: part.to(dtype).requires_grad_() if part.is_floating_point() else part
                for key, part in parts.items()
            }
            value = contract.oracle(**inputs, **options)
            gradients = torch.autograd.grad(value, [inputs[row] for row in rows], result.detach()[end].to(value.dtype))
            expected.append((value.detach(), gradients))
        (truth, true_gradients), (plain, plain_gradients) = expected
        assert_within(result.detach()[end], truth, plain, contract.tolerance, what=f"{name} {end}")
        for row, true, base in zip(rows, true_gradients, plain_gradients, strict=True):
            assert_within(
                found[row][end], true, base, contract.gradient_tolerance, what=f"{name}: gradient of {row} {end}"
            )


def normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator)


@pytest.fixture(autouse=True)
def memory():
    """The poison of `conftest` would cost a pass over memory per tensor; what is held is given back between tests."""
    yield
    torch.cuda.empty_cache()


def test_rmsnorm():
    from cs336_triton.rmsnorm import rmsnorm

    check_ends("rmsnorm", rmsnorm, {"x": normal(2**19 + 5, 4096), "weight": normal(4096)}, ("x",), eps=1e-5)


def test_silu():
    from cs336_triton.silu import silu

    check_ends("silu", silu, {"x": normal(2**19 + 5, 4096)}, ("x",))


def test_silu_of_one_row_that_ends_just_before_two_to_the_31():
    from cs336_triton.silu import silu

    x = normal(2**31 - 1)
    result = silu(x)
    for end in ENDS:
        torch.testing.assert_close(result[end], torch.nn.functional.silu(x[end]))


def test_swiglu():
    from cs336_triton.swiglu import swiglu

    tensors = {"gate": normal(2**19 + 5, 4096), "up": normal(2**19 + 5, 4096)}
    check_ends("swiglu", swiglu, tensors, ("gate", "up"))


def test_softmax():
    from cs336_triton.softmax import softmax

    check_ends("softmax", softmax, {"x": normal(2**16 + 5, 32768)}, ("x",), dim=-1)


def test_cross_entropy():
    from cs336_triton.cross_entropy import cross_entropy

    rows, vocab = 2**14 + 133, 131072
    targets = torch.arange(rows, device="cuda") * 7919 % vocab
    tensors = {"logits": normal(rows, vocab), "targets": targets}
    check_ends("cross_entropy", cross_entropy, tensors, ("logits",), reduction="none")


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_attention_of_many_heads(is_causal):
    from cs336_triton.attention import attention

    tensors = {name: normal(16405, 8, 128, 128) for name in ("q", "k", "v")}
    check_ends("attention", attention, tensors, ("q", "k", "v"), is_causal=is_causal)


def test_attention_with_a_large_mask():
    """The mask alone has more than 2³¹ entries; only its last rows let a query see a single, late key."""
    from cs336_triton.attention import attention

    length = 46400
    q, k, v = (normal(1, 1, length, 16) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda")
    mask[-2:] = False
    mask[-1, -2] = True
    result = attention(q, k, v, mask)
    assert torch.equal(result[0, 0, -1], v[0, 0, -2])
    assert (result[0, 0, -2] == 0).all()
    expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, :1], k, v)
    torch.testing.assert_close(result[:, :, :1], expected, rtol=2e-2, atol=2e-3)
