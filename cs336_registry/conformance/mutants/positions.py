"""Wrong rotary embeddings."""

from __future__ import annotations

import torch

from . import mutation
from ._gradients import changed_gradient


@mutation("rope", "the pairs are (i, i + d/2), the two halves, instead of neighbours")
def halves_instead_of_pairs(textbook):
    def rope(q, k, cos, sin, token_positions=None):
        def interleaved(x):
            return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

        def halved(x):
            return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

        rotated = textbook(interleaved(q), None if k is None else interleaved(k), cos, sin, token_positions)
        return tuple(None if x is None else halved(x) for x in rotated)

    return rope


@mutation("rope", "token_positions are ignored")
def positions_ignored(textbook):
    def rope(q, k, cos, sin, token_positions=None):
        return textbook(q, k, cos, sin, None)

    return rope


@mutation("rope", "the default positions start at 1")
def positions_start_at_one(textbook):
    def rope(q, k, cos, sin, token_positions=None):
        if token_positions is None:
            token_positions = (torch.arange(q.shape[-2], device=q.device) + 1).clamp(max=len(cos) - 1)
        return textbook(q, k, cos, sin, token_positions)

    return rope


@mutation("rope", "the rotation goes the other way round")
def rotation_backwards(textbook):
    return lambda q, k, cos, sin, token_positions=None: textbook(q, k, cos, -sin, token_positions)


@mutation("rope", "the keys are not rotated")
def keys_not_rotated(textbook):
    def rope(q, k, cos, sin, token_positions=None):
        return textbook(q, None, cos, sin, token_positions)[0], k

    return rope


@mutation("rope", "the first row's positions serve the whole batch")
def first_positions_for_all(textbook):
    def rope(q, k, cos, sin, token_positions=None):
        if token_positions is not None and token_positions.ndim > 1 and token_positions.shape[0] > 1:
            token_positions = token_positions[:1].expand(token_positions.shape)
        return textbook(q, k, cos, sin, token_positions)

    return rope


@mutation("rope", "the backward pass rotates forwards again")
def gradient_rotated_forwards(textbook):
    def rope(q, k, cos, sin, token_positions=None):
        q_rotated, k_rotated = textbook(q, k, cos, sin, token_positions)

        def twice(gradient):
            there, _ = textbook(gradient, None, cos, sin, token_positions)
            return textbook(there, None, cos, sin, token_positions)[0]

        return changed_gradient(q_rotated, twice), k_rotated

    return rope


@mutation("rope", "the tables are rounded to bfloat16")
def tables_in_bfloat16(textbook):
    def rope(q, k, cos, sin, token_positions=None):
        return textbook(q, k, cos.bfloat16().float(), sin.bfloat16().float(), token_positions)

    return rope


@mutation(
    "rope",
    "the tables of an earlier call with the same shape are used again, whatever theta or positions",
    groups=("again",),
)
def tables_cached_by_shape(textbook):
    cache = {}

    def rope(q, k, cos, sin, token_positions=None):
        cos, sin = cache.setdefault((cos.shape, cos.dtype), (cos, sin))
        if token_positions is not None:
            token_positions = cache.setdefault((token_positions.shape, len(cos)), token_positions)
        return textbook(q, k, cos, sin, token_positions)

    return rope


@mutation("rope", "the last pair of every key is not rotated")
def keys_lose_their_last_pair(textbook):
    def rope(q, k, cos, sin, token_positions=None):
        q_rotated, k_rotated = textbook(q, k, cos, sin, token_positions)
        if k is None or k.shape[-1] < 4:
            return q_rotated, k_rotated
        return q_rotated, torch.cat([k_rotated[..., :-2], k[..., -2:]], dim=-1)

    return rope
