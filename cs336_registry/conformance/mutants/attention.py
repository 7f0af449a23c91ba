"""Wrong attention: one textbook forward pass with a switch for each bug."""

from __future__ import annotations

import time

import torch

from . import mutation
from ._gradients import changed_gradient
from .normalisation import wide


def scores_allowed(q, k, mask, is_causal, document_ids, diagonal=0):
    """Which keys each query may see, or None for all."""
    allowed = mask
    if is_causal:
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(diagonal)
        allowed = causal if allowed is None else allowed & causal
    if document_ids is not None:
        same = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)
        same = same.unsqueeze(-3) if q.ndim >= 4 else same
        allowed = same if allowed is None else allowed & same
    return allowed


def attend(q, k, v, allowed, scale, *, fill=float("-inf"), zero_dead=True, dim=-1, weights_change=None):
    """The definition, with the scores in memory."""
    dtype, (q, k, v) = q.dtype, (wide(q), wide(k), wide(v))
    if q.ndim >= 4 and k.shape[-3] != q.shape[-3]:
        groups = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(groups, dim=-3), v.repeat_interleave(groups, dim=-3)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if allowed is not None:
        if zero_dead:
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        else:
            scores = scores.masked_fill(~allowed, fill)
    weights = torch.softmax(scores, dim)
    if allowed is not None and zero_dead:
        weights = weights * allowed
    if weights_change is not None:
        weights = weights_change(weights)
    return (weights @ v).to(dtype)


def _bug(bug, name, **details):
    """Register `spoil(q, k, v, mask, is_causal, document_ids, scale)` under `name`."""

    def register(spoil):
        def make(textbook):
            def attention(q, k, v, mask=None, *, is_causal=False, document_ids=None, scale=None):
                return spoil(q, k, v, mask, is_causal, document_ids, scale)

            return attention

        make.__name__ = name
        mutation("attention", bug, **details)(make)
        return spoil

    return register


@_bug("there is no causal mask", "causal_mask_missing")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, mask, False, document_ids), scale)


@_bug("the causal mask lets each query see one key of the future", "causal_one_too_many")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids, diagonal=1), scale)


@_bug("the causal mask hides each query's own key", "causal_one_too_few")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids, diagonal=-1), scale)


@_bug("the causal mask is aligned at the bottom right", "causal_aligned_at_the_end")
def _(q, k, v, mask, is_causal, document_ids, scale):
    diagonal = k.shape[-2] - q.shape[-2]
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids, diagonal=diagonal), scale)


@_bug("is_causal replaces the mask instead of joining it", "causal_replaces_the_mask")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, None if is_causal else mask, is_causal, document_ids), scale)


@_bug("the scores are not scaled", "scale_missing")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), 1.0 if scale is None else scale)


@_bug("scale is ignored", "own_scale_ignored")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), None)


@_bug("the default scale is that of the values' width", "scale_of_the_value_width")
def _(q, k, v, mask, is_causal, document_ids, scale):
    scale = v.shape[-1] ** -0.5 if scale is None else scale
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("the mask is inverted: True means hide", "mask_inverted")
def _(q, k, v, mask, is_causal, document_ids, scale):
    mask = None if mask is None else ~mask
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("the mask is ignored", "mask_ignored")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, None, is_causal, document_ids), scale)


@_bug("the first head's mask serves all heads", "mask_of_the_first_head")
def _(q, k, v, mask, is_causal, document_ids, scale):
    if mask is not None and mask.ndim >= 3:
        mask = mask[..., :1, :, :].expand(mask.shape)
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("hidden scores are -10 instead of minus infinity", "mask_is_only_small")
def _(q, k, v, mask, is_causal, document_ids, scale):
    allowed = scores_allowed(q, k, mask, is_causal, document_ids)
    return attend(q, k, v, allowed, scale, fill=-10.0, zero_dead=False)


@_bug("a query without keys gives NaN", "dead_queries_are_nan")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale, zero_dead=False)


@_bug("a query without keys gives the mean of all values", "dead_queries_give_the_mean")
def _(q, k, v, mask, is_causal, document_ids, scale):
    allowed = scores_allowed(q, k, mask, is_causal, document_ids)
    fill = torch.finfo(wide(q).dtype).min
    return attend(q, k, v, allowed, scale, fill=fill, zero_dead=False)


@_bug("the softmax runs over the queries", "softmax_over_queries")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale, dim=-2)


@_bug("document_ids are ignored", "documents_ignored")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, None), scale)


@_bug("only neighbouring tokens are compared, so a document that comes back is not recognised", "documents_as_runs")
def _(q, k, v, mask, is_causal, document_ids, scale):
    if document_ids is not None:
        changes = torch.ones_like(document_ids)
        changes[..., 1:] = document_ids[..., 1:] != document_ids[..., :-1]
        document_ids = changes.cumsum(-1)
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("the first row's documents serve the whole batch", "documents_of_the_first_row")
def _(q, k, v, mask, is_causal, document_ids, scale):
    if document_ids is not None and document_ids.ndim > 1 and document_ids.shape[0]:
        document_ids = document_ids[:1].expand(document_ids.shape)
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("head h reads kv head h modulo kv_heads, not h // group", "groups_interleaved")
def _(q, k, v, mask, is_causal, document_ids, scale):
    if q.ndim >= 4 and k.shape[-3] != q.shape[-3]:
        times = (*(1,) * (q.ndim - 3), q.shape[-3] // k.shape[-3], 1, 1)
        k, v = k.repeat(times), v.repeat(times)
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("of a group, only the first head sends a gradient to k and v", "group_gradient_of_one_head")
def _(q, k, v, mask, is_causal, document_ids, scale):
    if q.ndim >= 4 and k.shape[-3] != q.shape[-3]:
        groups = q.shape[-3] // k.shape[-3]
        k, v = (
            torch.cat(
                [t.unsqueeze(-3), t.detach().unsqueeze(-3).expand(*t.shape[:-2], groups - 1, *t.shape[-2:])], -3
            ).flatten(-4, -3)
            for t in (k, v)
        )
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("the last keys, beyond a block of 16, are left out", "last_keys_left_out")
def _(q, k, v, mask, is_causal, document_ids, scale):
    keys = max(k.shape[-2] // 16 * 16, min(16, k.shape[-2]))
    allowed = scores_allowed(q, k, mask, is_causal, document_ids)
    allowed = allowed[..., :keys] if allowed is not None and allowed.shape[-1] > 1 else allowed
    return attend(q, k[..., :keys, :], v[..., :keys, :], allowed, scale)


@_bug("keys are padded with zeros to a block of 16 and the padding is attended to", "padding_attended")
def _(q, k, v, mask, is_causal, document_ids, scale):
    allowed, extra = scores_allowed(q, k, mask, is_causal, document_ids), -k.shape[-2] % 16
    if allowed is None:
        k, v = (torch.nn.functional.pad(tensor, (0, 0, 0, extra)) for tensor in (k, v))
    return attend(q, k, v, allowed, scale)


@_bug("the exponentials are taken without subtracting the maximum", "maximum_of_scores_not_subtracted")
def _(q, k, v, mask, is_causal, document_ids, scale):
    allowed = scores_allowed(q, k, mask, is_causal, document_ids)
    if q.ndim >= 4 and k.shape[-3] != q.shape[-3]:
        k, v = (tensor.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for tensor in (k, v))
    powers = ((wide(q) @ wide(k).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)).exp()
    powers = powers if allowed is None else powers * allowed
    total = powers.sum(-1, keepdim=True)
    return ((powers / total.masked_fill(total == 0, 1.0)) @ wide(v)).to(q.dtype)


@_bug("the gradient of v is missing", "value_gradient_missing")
def _(q, k, v, mask, is_causal, document_ids, scale):
    return attend(q, k, v.detach(), scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("the gradient of k misses the scale", "key_gradient_unscaled")
def _(q, k, v, mask, is_causal, document_ids, scale):
    factor = q.shape[-1] ** 0.5 if scale is None else 1 / scale
    k = changed_gradient(k, lambda gradient: gradient * factor)
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@_bug("the backward pass leaves out the row sums of dP·P", "row_sums_left_out_of_the_gradient")
def _(q, k, v, mask, is_causal, document_ids, scale):
    allowed = scores_allowed(q, k, mask, is_causal, document_ids)
    if q.ndim >= 4 and k.shape[-3] != q.shape[-3]:
        k, v = (tensor.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3) for tensor in (k, v))
    scores = (wide(q) @ wide(k).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if allowed is None else scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    normaliser = torch.logsumexp(scores, -1, keepdim=True).detach()
    weights = (scores - normaliser).exp()
    weights = weights if allowed is None else weights * allowed
    return (weights @ wide(v)).to(q.dtype)


@_bug("the scale is multiplied into q in place", "query_scaled_in_place", groups=("mutation",))
def _(q, k, v, mask, is_causal, document_ids, scale):
    with torch.no_grad():
        q.mul_(q.shape[-1] ** -0.5 if scale is None else scale)
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), 1.0)


@_bug("one element of dropout in a hundred is still on", "dropout_left_on")
def _(q, k, v, mask, is_causal, document_ids, scale):
    def drop(weights):
        return torch.nn.functional.dropout(weights, 0.01)

    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale, weights_change=drop)


@_bug("the last queries, beyond a block of 16, are never written", "last_queries_uninitialised", groups=("poison",))
def _(q, k, v, mask, is_causal, document_ids, scale):
    right = attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)
    result, rows = torch.empty_like(right), max(q.shape[-2] // 16 * 16, min(16, q.shape[-2]))
    result[..., :rows, :] = right[..., :rows, :]
    return result


@_bug("k is read as if its heads lay behind one another in memory", "key_strides_ignored", groups=("layout",))
def _(q, k, v, mask, is_causal, document_ids, scale):
    packed = torch.empty(k.shape, device="meta").stride()
    k = k if k.is_contiguous() else torch.as_strided(k, k.shape, packed)
    return attend(q, k, v, scores_allowed(q, k, mask, is_causal, document_ids), scale)


@mutation("attention", "the mask of an earlier call with the same shape is used again", groups=("again",))
def mask_cached_by_shape(textbook):
    cache = {}

    def attention(q, k, v, mask=None, *, is_causal=False, document_ids=None, scale=None):
        key = (q.shape, k.shape, None if mask is None else mask.shape, is_causal, document_ids is None)
        if key not in cache:
            cache[key] = scores_allowed(q, k, mask, is_causal, document_ids)
        return attend(q, k, v, cache[key], scale)

    return attention


@mutation("attention", "the keys' transpose is kept in a buffer that all threads share", groups=("threads",))
def shared_key_buffer(textbook):
    buffer = {}

    def attention(q, k, v, mask=None, *, is_causal=False, document_ids=None, scale=None):
        allowed = scores_allowed(q, k, mask, is_causal, document_ids)
        buffer[k.shape] = k.clone()
        time.sleep(1e-4)
        # Keys of the same shape are often the same case's, so that the scale is what goes wrong.
        buffer["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
        time.sleep(1e-4)
        return attend(q, buffer[k.shape], v, allowed, buffer["scale"])

    return attention
