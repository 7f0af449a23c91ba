"""Scaled dot-product attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ..arguments import ArgumentMaker
from ..checks import require_floating, require_integer, require_same_dtype
from ..compare import assert_nearly_equal
from ..component import Arguments, Case, Component, ErrorCase, Law, Tolerance, Workload

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def attention(
    q: Float[Tensor, "*batch heads queries d_head"],
    k: Float[Tensor, "*batch kv_heads keys d_head"],
    v: Float[Tensor, "*batch kv_heads keys d_value"],
    mask: Bool[Tensor, "*broadcast queries keys"] | None = None,
    *,
    is_causal: bool = False,
    document_ids: Int[Tensor, "*batch queries"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "*batch heads queries d_value"]:
    """Average the values, weighted by how well each key answers the query: `softmax(q @ k.T * scale) @ v`.

    q, k, v: any leading dimensions, none included; with four or more dimensions the last leading one counts heads, and
    each of the kv_heads serves heads / kv_heads consecutive heads (grouped-query attention).
    mask: boolean, broadcastable to (..., queries, keys), True = attend. is_causal: query i attends to keys 0..i
    (aligned at the top left). document_ids: tokens attend only to tokens of an equal id; without heads, queries = keys.
    All that are given must allow a key. A query that may attend to nothing gets 0 and has no gradient. scale: by
    default 1 / sqrt(d_head).
    Computed in float32 (float64 stays float64); the result has the dtype of q.
    Raises ValueError where shapes do not fit, there are no keys or scale is not positive, TypeError for dtypes.
    Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; grouped queries: Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245.
    """
    raise NotImplementedError


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    document_ids: Tensor | None,
    scale: float | None,
) -> None:
    """Refuse arguments outside the contract; every backend calls this, so every backend says the same."""
    require_floating("attention", q=q, k=k, v=v)
    require_same_dtype("attention", q=q, k=k, v=v)
    if q.ndim < 2 or k.ndim != q.ndim or v.ndim != q.ndim:
        raise ValueError(f"attention: {_shapes(q, k, v)}: they must have equally many dimensions, at least two")
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"attention: {_shapes(q, k, v)}: the last dimension of q and k must be equal and not empty")
    if k.shape[:-1] != v.shape[:-1] or k.shape[-2] == 0:
        raise ValueError(
            f"attention: {_shapes(q, k, v)}: k and v must agree in all but the last dimension, with at least one key"
        )
    if q.ndim < 4 and q.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"attention: {_shapes(q, k, v)}: the leading dimensions must be equal")
    if q.ndim >= 4 and (q.shape[:-3] != k.shape[:-3] or k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]):
        raise ValueError(
            f"attention: {_shapes(q, k, v)}: the batch dimensions must be equal and the heads of k and v must divide "
            f"the heads of q"
        )
    if mask is not None:
        _check_mask(mask, (*q.shape[:-1], k.shape[-2]))
    if document_ids is not None:
        _check_documents(document_ids, q.shape[:-3] if q.ndim >= 4 else q.shape[:-2], q.shape[-2], k.shape[-2])
    if scale is not None and not scale > 0:
        raise ValueError(f"attention: scale is {scale}: it must be positive (the default is 1 / sqrt(d_head))")


def _shapes(*tensors: Tensor) -> str:
    return f"q, k, v have shapes {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}"


def _check_mask(mask: Tensor, scores: tuple[int, ...]) -> None:
    import torch

    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"attention: mask is {found}: it must be a boolean tensor, True = attend")
    if not _broadcasts(mask.shape, scores):
        raise ValueError(
            f"attention: mask has shape {tuple(mask.shape)}, which does not broadcast to the scores' {scores}"
        )


def _check_documents(document_ids: Tensor, batch: tuple[int, ...], queries: int, keys: int) -> None:
    require_integer("attention", document_ids=document_ids)
    if queries != keys:
        raise ValueError(f"attention: document_ids need equally many queries and keys, not {queries} and {keys}")
    if document_ids.ndim == 0 or document_ids.shape[-1] != keys or not _broadcasts(document_ids.shape, (*batch, keys)):
        raise ValueError(
            f"attention: document_ids has shape {tuple(document_ids.shape)}, which does not broadcast to "
            f"{(*batch, keys)} (without heads)"
        )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    fits = all(size in (1, wanted) for size, wanted in zip(reversed(shape), reversed(target), strict=False))
    return len(shape) <= len(target) and fits


def allowed_keys(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, document_ids: Tensor | None
) -> Tensor | None:
    """What mask, causality and documents allow together: a boolean that broadcasts to the scores, or None for "
    "everything."""
    import torch

    allowed = mask
    if is_causal:
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        allowed = causal if allowed is None else allowed & causal
    if document_ids is not None:
        same = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)
        same = same.unsqueeze(-3) if q.ndim >= 4 else same
        allowed = same if allowed is None else allowed & same
    return allowed


def arguments(case: Case, make: ArgumentMaker) -> Arguments:
    sizes = case.sizes
    leading, queries, d_head = sizes.get("leading", (2, 3)), sizes["queries"], sizes["d_head"]
    keys = sizes.get("keys", queries)
    kv_leading = (*leading[:-1], sizes["kv_heads"]) if "kv_heads" in sizes else leading
    found: Arguments = {
        "q": make.normal(*leading, queries, d_head, scale=sizes.get("q_scale", 1.0)),
        "k": make.normal(*kv_leading, keys, d_head),
        "v": make.normal(*kv_leading, keys, sizes.get("value_dim", d_head)),
        "is_causal": sizes.get("is_causal", False),
        "scale": sizes.get("scale"),
    }
    if "score_shift" in sizes:
        # One feature adds the same number to every score.
        found["q"][..., 0], found["k"][..., 0] = 64.0, sizes["score_shift"] * d_head**0.5 / 64.0
    if "mask" in sizes:
        mask = make.boolean(*sizes["mask"], probability=sizes.get("probability", 0.6))
        mask[..., list(sizes.get("dead_queries", ())), :] = False
        found["mask"] = mask
    if "documents" in sizes:
        batch = leading[:-1] if len(leading) >= 2 else leading
        found["document_ids"] = make.integers(*batch, keys, high=sizes["documents"])
        if not sizes.get("interleaved", False):
            found["document_ids"] = found["document_ids"].sort(-1).values
    return found


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition, with every score in memory: the sum of exp(s) v over the sum of exp(s).

    In half precision the exponentials are rounded before they meet the values, as matrix units need them, so that the
    error of this function in a dtype is the one that a sound kernel makes too.
    """
    import torch

    wide = torch.promote_types(q.dtype, torch.float32)
    dtype, (q, k, v) = q.dtype, (tensor.to(wide) for tensor in (q, k, v))
    if q.ndim >= 4:
        k, v = (tensor.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for tensor in (k, v))
    scores = torch.einsum("...qd,...kd->...qk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones(scores.shape, dtype=torch.bool, device=q.device)
    if mask is not None:
        allowed = allowed & mask
    if is_causal:
        query, key = (torch.arange(size, device=q.device) for size in scores.shape[-2:])
        allowed = allowed & (key[None, :] <= query[:, None])
    if document_ids is not None:
        same = document_ids[..., :, None] == document_ids[..., None, :]
        allowed = allowed & (same[..., None, :, :] if q.ndim >= 4 else same)
    # The lowest finite score instead of -inf: a row without any key stays finite, and is then zeroed.
    scores = scores.masked_fill(~allowed, torch.finfo(wide).min)
    exponentials = torch.exp(scores - scores.detach().amax(dim=-1, keepdim=True)) * allowed
    total = exponentials.sum(dim=-1, keepdim=True)
    values = torch.einsum("...qk,...kv->...qv", exponentials.to(dtype).to(wide), v)
    return (values / total.masked_fill(total == 0, 1.0)).to(dtype)


def the_future_is_not_seen(attention, make: ArgumentMaker) -> None:
    for length, seen in ((1, 0), (17, 4), (63, 40), (63, 0)):
        q, k, v = (make.normal(1, 2, length, 16) for _ in range(3))
        k_later, v_later = k.clone(), v.clone()
        k_later[..., seen + 1 :, :] += 3.0
        v_later[..., seen + 1 :, :] += 100.0
        before = attention(q, k, v, is_causal=True)[..., : seen + 1, :]
        after = attention(q, k_later, v_later, is_causal=True)[..., : seen + 1, :]
        assert_nearly_equal(after, before, what=f"queries up to {seen} of {length} after a change of later keys")


def the_present_is_seen(attention, make: ArgumentMaker) -> None:
    q, k, v = (make.normal(1, 1, 9, 16) for _ in range(3))
    assert_nearly_equal(attention(q, k, v, is_causal=True)[..., 0, :], v[..., 0, :], what="the first query's result")
    changed = v.clone()
    changed[..., 5, :] += 100.0
    moved = (attention(q, k, changed, is_causal=True) - attention(q, k, v, is_causal=True)).abs().amax((0, 1, 3))
    assert (moved[5:] > 0).all(), "a query must see its own key and the keys before it"


def a_shift_of_all_keys_changes_nothing(attention, make: ArgumentMaker) -> None:
    q, v = make.normal(2, 2, 9, 16), make.normal(2, 2, 21, 16)
    # Multiples of 1/8, so that the shifted keys are exact in every dtype but bfloat16's finest.
    k = make.tensor(make.generator.integers(-8, 9, (2, 2, 21, 16)) / 8)
    assert_nearly_equal(attention(q, k + 2.0, v), attention(q, k, v))


def order_of_keys_does_not_matter(attention, make: ArgumentMaker) -> None:
    import torch

    q, k, v = make.normal(2, 2, 5, 16), make.normal(2, 2, 33, 16), make.normal(2, 2, 33, 16)
    order = torch.from_numpy(make.generator.permutation(33)).to(q.device)
    assert_nearly_equal(attention(q, k[..., order, :], v[..., order, :]), attention(q, k, v))


def equal_keys_give_the_mean(attention, make: ArgumentMaker) -> None:
    q, v = make.normal(2, 2, 5, 16), make.normal(2, 2, 31, 16)
    k = make.normal(2, 2, 1, 16).expand(2, 2, 31, 16)
    mean = v.double().mean(-2, keepdim=True).expand(2, 2, 5, 16).to(v.dtype)
    assert_nearly_equal(attention(q, k, v), mean)


def linear_in_the_values(attention, make: ArgumentMaker) -> None:
    q, k, one = (make.normal(2, 2, 9, 16) for _ in range(3))
    assert_nearly_equal(attention(q, k, 4 * one), 4 * attention(q, k, one))


def default_scale(attention, make: ArgumentMaker) -> None:
    q, k, v = (make.normal(1, 2, 7, 16) for _ in range(3))
    assert_nearly_equal(attention(q, k, v), attention(q, k, v, scale=0.25))
    assert_nearly_equal(attention(4 * q, k, v, scale=0.25), attention(q, k, v, scale=1.0))


def causal_is_a_triangular_mask(attention, make: ArgumentMaker) -> None:
    import torch

    for queries, keys in ((9, 9), (5, 12), (12, 5)):
        q, k, v = make.normal(1, 2, queries, 16), make.normal(1, 2, keys, 16), make.normal(1, 2, keys, 16)
        triangle = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
        masked = attention(q, k, v, triangle)
        assert_nearly_equal(attention(q, k, v, is_causal=True), masked, what=f"{queries} x {keys}")


def nothing_to_attend_to_gives_zero(attention, make: ArgumentMaker) -> None:
    import torch

    q, k, v = (make.normal(1, 2, 6, 16).requires_grad_() for _ in range(3))
    mask = make.boolean(6, 6, probability=0.5)
    mask[:, 1], mask[[0, 4]] = True, False
    result = attention(q, k, v, mask)
    assert (result[..., [0, 4], :] == 0).all(), "a query without keys must give exactly 0"
    gradients = torch.autograd.grad(result, (q, k, v), make.normal(*result.shape))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients), "a gradient is NaN or infinite"
    assert (gradients[0][..., [0, 4], :] == 0).all(), "a query without keys must have no gradient"


def documents_are_alone(attention, make: ArgumentMaker) -> None:
    import torch

    q, k, v = (make.normal(1, 2, 20, 16) for _ in range(3))
    lengths = [3, 1, 9, 7]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).unsqueeze(0).to(q.device)
    packed = attention(q, k, v, is_causal=True, document_ids=ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        alone = attention(q[..., part, :], k[..., part, :], v[..., part, :], is_causal=True)
        assert_nearly_equal(packed[..., part, :], alone, what=f"document at {start}")
        start += length


def groups_share_keys(attention, make: ArgumentMaker) -> None:
    q, k, v = make.normal(2, 6, 7, 16), make.normal(2, 2, 9, 16), make.normal(2, 2, 9, 16)
    repeated = (tensor.repeat_interleave(3, dim=1) for tensor in (k, v))
    assert_nearly_equal(attention(q, k, v), attention(q, *repeated))


def _workload(
    batch: int, heads: int, kv_heads: int, seq: int, d_head: int, is_causal: bool, device: Literal["any", "cpu", "cuda"]
) -> Workload:
    moved = 2 * batch * (heads + kv_heads) * seq * d_head
    flops = 4.0 * batch * heads * seq * seq * d_head * (0.5 if is_causal else 1.0)
    return Workload(
        id=f"b{batch}_h{heads}_kv{kv_heads}_s{seq}_d{d_head}_{'causal' if is_causal else 'full'}",
        sizes={
            "leading": (batch, heads),
            "kv_heads": kv_heads,
            "queries": seq,
            "d_head": d_head,
            "is_causal": is_causal,
        },
        bytes_moved=lambda itemsize: moved * itemsize,
        backward_bytes_moved=lambda itemsize: 2 * moved * itemsize,
        flops=flops,
        # Five products of the forward's size: the scores again, dV, dP, dQ and dK.
        backward_flops=2.5 * flops,
        device=device,
    )


contract = Component(
    signature=attention,
    kind="op",
    summary="scaled dot-product attention",
    formula="softmax(q kᵀ · scale) v",
    paper="https://arxiv.org/abs/1706.03762",
    arguments=arguments,
    oracle=oracle,
    dtypes=("float32", "bfloat16", "float16", "float64"),
    differentiable=("q", "k", "v"),
    features=("mask", "documents", "grouped_query", "value_dim"),
    tolerance=Tolerance(
        factor=3.0,
        floor=4.0,
        reason="tiles round the scores once more (log2(e) in the scale) and rescale the running sum once per tile",
    ),
    gradient_tolerance=Tolerance(
        factor=3.0,
        floor=8.0,
        absolute=64.0,
        reason="dS = P(dP - D) cancels: P is recomputed from a rounded log-sum-exp, D summed in another order; "
        "where a query sees one key it is a difference of equal numbers near 1",
    ),
    cases=(
        Case(id="course", sizes={"leading": (4,), "queries": 12, "keys": 16, "d_head": 64}),
        Case(id="course_causal", sizes={"leading": (4,), "queries": 128, "d_head": 64, "is_causal": True}),
        Case(id="heads", sizes={"queries": 33, "d_head": 16}),
        Case(id="causal", sizes={"queries": 63, "d_head": 32, "is_causal": True}),
        Case(id="two_dimensions", sizes={"leading": (), "queries": 9, "keys": 7, "d_head": 16, "is_causal": True}),
        Case(id="many_leading", sizes={"leading": (2, 1, 3), "queries": 5, "d_head": 8, "is_causal": True}),
        Case(id="no_rows", sizes={"leading": (0, 3), "queries": 5, "d_head": 16}),
        Case(id="one_token", sizes={"queries": 1, "d_head": 16, "is_causal": True}),
        Case(id="one_query", sizes={"queries": 1, "keys": 63, "d_head": 16}),
        Case(id="one_key", sizes={"queries": 9, "keys": 1, "d_head": 16}),
        Case(id="fewer_keys_causal", sizes={"queries": 70, "keys": 41, "d_head": 16, "is_causal": True}),
        Case(id="more_keys_causal", sizes={"queries": 41, "keys": 70, "d_head": 16, "is_causal": True}),
        Case(id="odd_head", sizes={"queries": 31, "d_head": 23}),
        Case(id="wide_head", sizes={"leading": (1, 1), "queries": 37, "d_head": 128, "is_causal": True}),
        Case(id="own_scale", sizes={"queries": 17, "d_head": 16, "scale": 0.5}),
        Case(id="large_scores", sizes={"queries": 17, "keys": 65, "d_head": 16, "q_scale": 30.0}),
        Case(
            id="scores_plus_ten_thousand",
            sizes={"queries": 17, "keys": 33, "d_head": 16, "score_shift": 1e4},
        ),
        Case(
            id="long",
            sizes={"leading": (1, 1), "queries": 130, "keys": 257, "d_head": 16},
        ),
        Case(id="mask", sizes={"queries": 21, "keys": 37, "d_head": 16, "mask": (2, 3, 21, 37)}, features=("mask",)),
        Case(id="mask_shared", sizes={"queries": 21, "keys": 37, "d_head": 16, "mask": (21, 37)}, features=("mask",)),
        Case(
            id="mask_of_keys",
            sizes={"queries": 21, "keys": 37, "d_head": 16, "mask": (2, 1, 1, 37)},
            features=("mask",),
        ),
        Case(
            id="mask_causal",
            sizes={"queries": 37, "d_head": 16, "mask": (2, 1, 37, 37), "is_causal": True},
            features=("mask",),
        ),
        Case(
            id="mask_without_heads",
            sizes={"leading": (3,), "queries": 12, "keys": 9, "d_head": 8, "mask": (3, 12, 9)},
            features=("mask",),
        ),
        Case(
            id="dead_queries",
            sizes={"queries": 70, "keys": 37, "d_head": 16, "mask": (2, 3, 70, 37), "dead_queries": (0, 5, 69)},
            features=("mask",),
        ),
        Case(
            id="all_dead",
            sizes={"queries": 5, "keys": 7, "d_head": 16, "mask": (5, 7), "probability": 0.0},
            features=("mask",),
        ),
        Case(
            id="documents",
            sizes={"queries": 63, "d_head": 16, "documents": 4},
            features=("documents",),
        ),
        Case(
            id="documents_causal",
            sizes={"queries": 63, "d_head": 16, "documents": 4, "is_causal": True},
            features=("documents",),
        ),
        Case(
            id="documents_interleaved",
            sizes={"queries": 40, "d_head": 16, "documents": 3, "interleaved": True, "is_causal": True},
            features=("documents",),
        ),
        Case(
            id="documents_without_heads",
            sizes={"leading": (2,), "queries": 19, "d_head": 8, "documents": 2},
            features=("documents",),
        ),
        Case(
            id="documents_and_mask",
            sizes={"queries": 19, "d_head": 16, "documents": 2, "mask": (19, 19), "is_causal": True},
            features=("documents", "mask"),
        ),
        Case(
            id="grouped_query",
            sizes={"leading": (2, 6), "kv_heads": 2, "queries": 19, "keys": 35, "d_head": 16},
            features=("grouped_query",),
        ),
        Case(
            id="multi_query_causal",
            sizes={"leading": (2, 4), "kv_heads": 1, "queries": 35, "d_head": 16, "is_causal": True},
            features=("grouped_query",),
        ),
        Case(
            id="grouped_query_mask",
            sizes={"leading": (2, 4), "kv_heads": 2, "queries": 9, "keys": 11, "d_head": 16, "mask": (2, 4, 9, 11)},
            features=("grouped_query", "mask"),
        ),
        Case(id="value_dim", sizes={"queries": 9, "keys": 21, "d_head": 16, "value_dim": 24}, features=("value_dim",)),
    ),
    error_cases=(
        ErrorCase(
            id="head_dims_differ",
            arguments=lambda make: {"q": make.normal(2, 8), "k": make.normal(3, 9), "v": make.normal(3, 8)},
            match="the last dimension of q and k must be equal and not empty",
        ),
        ErrorCase(
            id="keys_and_values_differ",
            arguments=lambda make: {"q": make.normal(2, 8), "k": make.normal(3, 8), "v": make.normal(4, 8)},
            match=r"q, k, v have shapes \(2, 8\), \(3, 8\), \(4, 8\): k and v must agree",
        ),
        ErrorCase(
            id="no_keys",
            arguments=lambda make: {"q": make.normal(2, 8), "k": make.normal(0, 8), "v": make.normal(0, 8)},
            match="with at least one key",
        ),
        ErrorCase(
            id="dimensions_differ",
            arguments=lambda make: {"q": make.normal(2, 2, 8), "k": make.normal(3, 8), "v": make.normal(3, 8)},
            match="they must have equally many dimensions",
        ),
        ErrorCase(
            id="leading_differ",
            arguments=lambda make: {"q": make.normal(2, 5, 8), "k": make.normal(3, 5, 8), "v": make.normal(3, 5, 8)},
            match="the leading dimensions must be equal",
        ),
        ErrorCase(
            id="heads_do_not_divide",
            arguments=lambda make: {
                "q": make.normal(1, 4, 5, 8),
                "k": make.normal(1, 3, 5, 8),
                "v": make.normal(1, 3, 5, 8),
            },
            match="the heads of k and v must divide the heads of q",
        ),
        ErrorCase(
            id="mask_not_boolean",
            arguments=lambda make: {
                "q": make.normal(2, 8),
                "k": make.normal(3, 8),
                "v": make.normal(3, 8),
                "mask": make.normal(2, 3),
            },
            error=TypeError,
            match="it must be a boolean tensor, True = attend",
        ),
        ErrorCase(
            id="mask_of_another_shape",
            arguments=lambda make: {
                "q": make.normal(2, 8),
                "k": make.normal(3, 8),
                "v": make.normal(3, 8),
                "mask": make.boolean(3, 2),
            },
            match=r"mask has shape \(3, 2\), which does not broadcast to the scores' \(2, 3\)",
        ),
        ErrorCase(
            id="documents_of_another_length",
            arguments=lambda make: {
                "q": make.normal(4, 8),
                "k": make.normal(4, 8),
                "v": make.normal(4, 8),
                "document_ids": make.integers(3, high=2),
            },
            match=r"document_ids has shape \(3,\), which does not broadcast to \(4,\)",
        ),
        ErrorCase(
            id="documents_need_as_many_keys",
            arguments=lambda make: {
                "q": make.normal(4, 8),
                "k": make.normal(5, 8),
                "v": make.normal(5, 8),
                "document_ids": make.integers(4, high=2),
            },
            match="document_ids need equally many queries and keys, not 4 and 5",
        ),
        ErrorCase(
            id="scale_not_positive",
            arguments=lambda make: {
                "q": make.normal(4, 8),
                "k": make.normal(4, 8),
                "v": make.normal(4, 8),
                "scale": 0.0,
            },
            match="scale is 0.0: it must be positive",
        ),
        ErrorCase(
            id="dtypes_differ",
            arguments=lambda make: {
                "q": make.normal(4, 8).float(),
                "k": make.normal(4, 8).half(),
                "v": make.normal(4, 8).float(),
            },
            error=TypeError,
            match="attention: k has dtype torch.float16 but q has torch.float32",
        ),
    ),
    laws=(
        Law(id="causality", statement="a later key or value changes no earlier result", check=the_future_is_not_seen),
        Law(id="present", statement="a causal query sees its own key", check=the_present_is_seen),
        Law(
            id="key_shift",
            statement="one vector added to all keys changes nothing",
            check=a_shift_of_all_keys_changes_nothing,
        ),
        Law(id="key_order", statement="keys and values may be permuted together", check=order_of_keys_does_not_matter),
        Law(id="equal_keys", statement="equal keys give the mean of the values", check=equal_keys_give_the_mean),
        Law(id="linear_in_v", statement="it is linear in the values", check=linear_in_the_values),
        Law(id="scale", statement="the default scale is 1 / sqrt(d_head)", check=default_scale),
        Law(
            id="causal_mask",
            statement="is_causal equals a lower triangular mask",
            check=causal_is_a_triangular_mask,
            features=("mask",),
        ),
        Law(
            id="dead_queries",
            statement="a query without keys gives 0 and has no gradient",
            check=nothing_to_attend_to_gives_zero,
            features=("mask",),
        ),
        Law(
            id="documents",
            statement="packed documents equal documents one by one",
            check=documents_are_alone,
            features=("documents",),
        ),
        Law(
            id="groups",
            statement="grouped-query heads equal repeated keys and values",
            check=groups_share_keys,
            features=("grouped_query",),
        ),
    ),
    workloads=(
        _workload(4, 16, 16, 256, 32, True, "any"),
        _workload(2, 12, 12, 1024, 64, True, "any"),
        _workload(8, 12, 12, 1024, 64, True, "cuda"),
        _workload(2, 16, 16, 8192, 128, True, "cuda"),
        _workload(2, 16, 16, 8192, 128, False, "cuda"),
        _workload(2, 32, 8, 8192, 128, True, "cuda"),
    ),
    adapter="run_scaled_dot_product_attention",
)
