"""The attention kernels: edges of tiles, masks, documents, groups, layouts, and the course's autograd function.

`check_against_float64` compares values and gradients with the contract's oracle, asks twice for the same bits and looks
for writes to inputs; `conftest` fills uninitialised memory with NaN.
"""

from __future__ import annotations

import math

import pytest
import torch

from .kernel_checks import (
    BFLOAT16,
    DTYPES,
    check_against_float64,
    check_full_graph,
    check_gradients_numerically,
    check_operator,
    maker,
)


@pytest.fixture
def attention():
    from cs336_triton.attention import attention

    return attention


def arguments(make, leading, queries, keys, d, *, kv_heads=None, value_d=None, **rest):
    kv_leading = leading if kv_heads is None else (*leading[:-1], kv_heads)
    q = make.normal(*leading, queries, d)
    k, v = make.normal(*kv_leading, keys, d), make.normal(*kv_leading, keys, value_d or d)
    return {"q": q, "k": k, "v": v, **rest}


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 63), (63, 1), (63, 63), (33, 70), (70, 33)], ids=str)
def test_lengths_that_fill_no_tile(attention, queries, keys, is_causal):
    check_against_float64("attention", attention, arguments(maker(), (1, 2), queries, keys, 16, is_causal=is_causal))


@pytest.mark.parametrize("dtype", [BFLOAT16, *DTYPES])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_dtypes(attention, dtype, is_causal):
    check_against_float64("attention", attention, arguments(maker(dtype), (2, 1), 63, 63, 64, is_causal=is_causal))


def test_float64_stays_float64(attention):
    check_against_float64("attention", attention, arguments(maker("float64"), (1, 1), 63, 37, 16, is_causal=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_tokens(attention, dtype):
    check_against_float64("attention", attention, arguments(maker(dtype), (1, 1), 1000, 1000, 16, is_causal=True))


@pytest.mark.parametrize("d", [1, 16, 23, 80, 128, 192, 256])
def test_head_dimensions(attention, d):
    check_against_float64("attention", attention, arguments(maker(), (1, 1), 17, 21, d, is_causal=True))


@pytest.mark.parametrize(("d", "value_d"), [(16, 40), (48, 8)], ids=str)
def test_values_of_another_width(attention, d, value_d):
    check_against_float64("attention", attention, arguments(maker(), (1, 2), 19, 37, d, value_d=value_d))


@pytest.mark.parametrize("leading", [(), (3,), (2, 2), (2, 1, 3), (0, 2), (2, 1, 1, 2)], ids=str)
def test_any_leading_dimensions(attention, leading):
    check_against_float64("attention", attention, arguments(maker(), leading, 9, 7, 16))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_scale(attention, scale):
    check_against_float64("attention", attention, arguments(maker(), (1, 1), 17, 37, 16, scale=scale))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_queries(attention, kv_heads):
    check_against_float64(
        "attention", attention, arguments(maker(), (2, 6), 21, 21, 16, kv_heads=kv_heads, is_causal=True)
    )


@pytest.mark.parametrize(
    ("leading", "mask_shape"),
    [
        ((2, 3), (21, 37)),
        ((2, 3), (37,)),
        ((2, 3), (2, 1, 1, 37)),
        ((2, 3), (3, 21, 1)),
        ((2, 3), (2, 3, 21, 37)),
        ((3,), (3, 21, 37)),
        ((), (21, 37)),
        ((2, 2, 1), (2, 1, 1, 21, 37)),
    ],
    ids=str,
)
def test_masks_broadcast(attention, leading, mask_shape):
    make = maker()
    mask = make.boolean(*mask_shape, probability=0.6)
    check_against_float64("attention", attention, arguments(make, leading, 21, 37, 16, mask=mask))


def test_masks_are_read_where_they_lie(attention):
    """A broadcast mask costs no memory: the kernel gets a view of the caller's storage, with zero strides."""
    from cs336_triton.attention import _four_dimensional_mask

    mask = maker().boolean(5, 7)
    for leading in ((), (3,), (2, 3), (2, 2, 3)):
        view = _four_dimensional_mask(mask, torch.Size(leading), 5, 7)
        if len(leading) <= 2:
            assert view.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
        assert view.untyped_storage().nbytes() <= 4 * mask.numel()
        assert (view == mask).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fully_masked_rows_give_zero(attention, dtype):
    make = maker(dtype)
    mask = make.boolean(2, 1, 40, 37, probability=0.5)
    mask[0, 0, [0, 33, 39]] = False
    mask[1] = False
    given = arguments(make, (2, 2), 40, 37, 16, mask=mask)
    check_against_float64("attention", attention, given)
    leaves = {name: given[name].requires_grad_() for name in ("q", "k", "v")}
    result = attention(**given)
    dead = ~mask.any(-1).expand(2, 2, 40)
    assert (result[dead] == 0).all()
    gradients = torch.autograd.grad(result, list(leaves.values()), torch.ones_like(result))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][dead] == 0).all()
    assert all((gradient[1] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("order", ["contiguous", "interleaved"])
def test_documents(attention, order, is_causal):
    make = maker()
    document_ids = make.integers(2, 75, high=4)
    if order == "contiguous":
        document_ids = document_ids.sort(-1).values
    given = arguments(make, (2, 2), 75, 75, 16, kv_heads=1, is_causal=is_causal, document_ids=document_ids)
    check_against_float64("attention", attention, given)


# Queries of the last documents do meet the poison, and NumPy warns about it in the interpreter.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_tiles_of_other_documents_are_not_read(attention):
    """Keys of documents that no query of a tile belongs to may hold anything: they are skipped, not masked."""
    make = maker()
    q, k, v = (make.normal(1, 1, 384, 16) for _ in range(3))
    document_ids = torch.arange(3).repeat_interleave(128).unsqueeze(0).to(q.device)
    expected = attention(q, k, v, document_ids=document_ids)
    k[..., 256:, :] = float("nan")
    v[..., 256:, :] = float("nan")
    found = attention(q, k, v, document_ids=document_ids)
    assert torch.equal(found[..., :256, :], expected[..., :256, :])


def test_tiles_above_the_diagonal_are_not_read(attention):
    make = maker()
    q, k, v = make.normal(1, 1, 128, 16), make.normal(1, 1, 256, 16), make.normal(1, 1, 256, 16)
    expected = attention(q, k, v, is_causal=True)
    k[..., 128:, :] = float("nan")
    v[..., 128:, :] = float("nan")
    assert torch.equal(attention(q, k, v, is_causal=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_strides(attention, dtype):
    check_against_float64("attention", attention, arguments(maker(dtype, strided=True), (2, 2), 33, 21, 16))


def test_heads_beside_features_keep_their_layout(attention):
    """(batch, sequence, heads, d) seen as (batch, heads, sequence, d): read as it is, and returned in that layout."""
    make = maker()
    given = {name: make.normal(2, 33, 3, 16).transpose(1, 2) for name in ("q", "k", "v")}
    check_against_float64("attention", attention, given)
    result = attention(**given)
    assert result.transpose(1, 2).is_contiguous()


def test_rows_too_far_apart_for_int32_are_brought_together():
    """Offsets within a tile of up to 1024 rows are int32: inputs are copied and results laid out anew."""
    from cs336_triton import attention
    from cs336_triton.cross_compilation import CARDS

    for stride, kept in ((2**21 - 16, True), (2**21, False)):
        x = torch.empty_strided((1, 2, 4, 16), (4 * stride, 16, stride, 1), device="meta")
        assert (attention._readable(x) is x) == kept
    # (sequence, batch, heads, d) of 2**21 numbers a token.
    x = torch.empty(8, 2**13, 16, 16, device="meta").permute(1, 2, 0, 3)
    assert attention._empty_rows(x).is_contiguous()
    assert attention._empty_rows(x[: 2**12].contiguous().transpose(1, 2)).transpose(1, 2).is_contiguous()
    tiles = [
        attention.candidate_configurations(kernel, dtype, width, CARDS[90])
        for kernel in ("attention_forward", "attention_delta", "attention_query_gradient", "attention_key_gradient")
        for dtype in (torch.bfloat16, torch.float32)
        for width in (16, 64, 128, 256)
    ]
    sizes = [value for tile in tiles for one in tile for name, value in one.constants if name.startswith("BLOCK")]
    assert max(sizes) == attention.LONGEST_TILE


def test_transposed_rows_and_an_expanded_gradient(attention):
    make = maker()
    given = {name: make.normal(1, 2, 16, 33).transpose(2, 3) for name in ("q", "k", "v")}
    check_against_float64("attention", attention, given)
    leaves = [tensor.contiguous().requires_grad_() for tensor in given.values()]
    summed = torch.autograd.grad(attention(*leaves).sum(), leaves)
    result = attention(*leaves)
    ones = torch.autograd.grad(result, leaves, torch.ones_like(result))
    assert all(torch.equal(one, other) for one, other in zip(summed, ones, strict=True))


def test_only_wanted_gradients(attention):
    """A gradient that nobody wants is not computed, and the others are the same."""
    from cs336_triton import configurations

    given = arguments(maker(), (1, 1), 17, 17, 16)
    leaves = {name: given[name].clone().requires_grad_() for name in given}
    output_grad = maker(seed=1).normal(1, 1, 17, 16)
    complete = dict(
        zip(given, torch.autograd.grad(attention(**leaves), list(leaves.values()), output_grad), strict=True)
    )
    with torch.no_grad():
        assert not attention(**leaves).requires_grad
    for name, kernel in (("q", "query"), ("k", "key"), ("v", "key")):
        result = attention(**(given | {name: leaves[name]}))
        with configurations.experiment({}) as asked:
            (gradient,) = torch.autograd.grad(result, leaves[name], output_grad)
        assert torch.equal(gradient, complete[name])
        assert {key[0] for key in asked.found} == {"attention_delta", f"attention_{kernel}_gradient"}


@pytest.mark.parametrize("variant", ["causal", "mask", "documents_grouped"])
def test_gradients_of_the_kernels_by_finite_differences(attention, variant):
    make = maker("float64")
    q, k, v = make.normal(1, 2, 4, 2), make.normal(1, 1, 4, 2), make.normal(1, 1, 4, 2)
    options = {
        "causal": {"is_causal": True},
        "mask": {"mask": make.boolean(4, 4, probability=0.5)},
        "documents_grouped": {"document_ids": torch.tensor([[0, 1, 1, 1]], device=q.device)},
    }[variant]
    check_gradients_numerically(lambda q, k, v: attention(q, k, v, **options), q, k, v)


def test_operators_are_registered_soundly():
    from cs336_triton.attention import attention_backward, attention_forward

    make = maker()
    q, k, v = (make.normal(1, 2, 9, 16) for _ in range(3))
    mask, documents = make.boolean(1, 1, 9, 9).expand(1, 2, 9, 9), make.integers(1, 9, high=2)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    check_operator(attention_forward, (*leaves, mask, documents, True, 0.25))
    check_operator(attention_forward, (*leaves, None, None, False, 0.25))
    plain = [tensor.detach() for tensor in (q, k, v)]
    output, *saved = attention_forward(*plain, None, None, True, 0.25)
    backward = (torch.ones_like(output), *plain, output, *saved, None, None, True, 0.25)
    check_operator(attention_backward, backward)
    check_operator(attention_backward, backward, want_q=False)
    check_operator(attention_backward, backward, want_kv=False)


def test_compiles_whole(attention):
    make = maker()
    q, k, v = (make.normal(2, 9, 2, 16).transpose(1, 2) for _ in range(3))
    check_full_graph(lambda q, k, v: attention(q, k, v, is_causal=True), q, k, v)
    mask = make.boolean(9, 9)
    check_full_graph(lambda q, k, v, mask: attention(q, k, v, mask).transpose(1, 2).reshape(2, 9, 32), q, k, v, mask)


def test_masks_have_tiles_of_their_own():
    """Documents and plain attention keep the large tiles that a mask has no registers for."""
    from cs336_triton import attention, configurations
    from cs336_triton.cross_compilation import CARDS, launches_of

    calls = dict(attention.production_calls())
    chosen = {}
    for label in ("bfloat16_d64_full", "bfloat16_d64_mask_odd", "bfloat16_d64_documents"):
        with configurations.experiment({}) as asked:
            launches_of(calls[label], CARDS[100])
        for (kernel, _, bucket), (default, *_) in asked.found.items():
            if kernel == "attention_forward":
                chosen[bucket] = (default["BLOCK_M"], default["BLOCK_N"])
    assert chosen == {"d64": (128, 128), "d64_masked": (64, 64), "d64_documents_causal": (128, 128)}


def test_head_dimensions_that_are_too_large_are_refused(attention):
    q = maker().normal(1, 1, 3, 257)
    with pytest.raises(ValueError, match="head dimension 257 exceeds 256"):
        attention(q, q, q)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_autograd_function_of_the_course(is_causal):
    from cs336_triton.attention import FlashAttention2, attention

    make = maker()
    q, k, v = (make.normal(3, 40, 16).requires_grad_() for _ in range(3))
    output = FlashAttention2.apply(q, k, v, is_causal)
    saved = [tensor for tensor in output.grad_fn.saved_tensors if tensor.shape == (3, 40)]
    assert len(saved) == 1
    scores = torch.einsum("bqd,bkd->bqk", q.double(), k.double()) / math.sqrt(16)
    if is_causal:
        scores = scores.masked_fill(torch.ones(40, 40, device=q.device).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(saved[0].double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)
    grad = make.normal(3, 40, 16)
    expected = attention(q, k, v, is_causal=is_causal)
    assert torch.equal(output, expected)
    found = torch.autograd.grad(output, (q, k, v), grad)
    for one, other in zip(found, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("variant", ["descriptors", "descriptors_persistent", "persistent", "warp_specialized"])
@pytest.mark.parametrize("kv_heads", [2, 1], ids=["heads", "grouped"])
def test_faster_variants_give_the_same_bits(attention, variant, kv_heads):
    """Tensor descriptors, a persistent grid and warp roles change who fetches what, and no arithmetic."""
    from cs336_triton import configurations

    make = maker()
    given = list(arguments(make, (2, 2), 75, 75, 16, kv_heads=kv_heads).values())
    output_grad = make.normal(2, 2, 75, 16)

    def values_and_gradients(*inputs):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        result = attention(*leaves, is_causal=True)
        return [result, *torch.autograd.grad(result, leaves, output_grad)]

    with configurations.experiment({}) as found:
        plain = values_and_gradients(*given)
    wanted = {name.upper(): name in variant for name in ("descriptors", "persistent")}
    wanted["WARP_SPECIALIZE"] = variant == "warp_specialized"
    chosen = {}
    for key, (default, *_) in found.found.items():
        constants = dict(default.constants)
        changed = constants | {name: value for name, value in wanted.items() if name in constants}
        chosen[key] = configurations.Configuration.of(default.num_warps, default.num_stages, **changed)
    assert len(chosen) == 4
    with configurations.experiment(chosen):
        # Rows that do not start at multiples of 16 bytes can't be described: pointers are used instead.
        strided = [torch.cat([x, x[..., :3]], dim=-1)[..., :16] for x in given]
        for inputs in (given, strided):
            for one, other in zip(values_and_gradients(*inputs), plain, strict=True):
                assert torch.equal(one, other)
