"""FlashAttention-2 in plain PyTorch: attention in tiles, so that no (queries, keys) matrix is ever held.

The letters are those of the paper (Dao 2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2): tiles Q_i and K_j,
V_j, scores S, unnormalised weights P, running maximum m and sum l, log-sum-exp L, and D = rowsum(dO * O).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from cs336_registry.components.attention import check

QUERY_TILE = 32
KEY_TILE = 32


class FlashAttention2(torch.autograd.Function):
    """`FlashAttention2.apply(q, k, v, is_causal=False)`: softmax(q @ k.T / sqrt(d)) @ v.

    q: (batch, queries, d), k and v: (batch, keys, d). Query i sees keys 0..i when is_causal. Forward keeps the inputs,
    the result and one (batch, queries) tensor, the log-sum-exp of the scores; backward computes the weights again from
    it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        check(q, k, v, None, is_causal, None, None)
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = 1 / math.sqrt(q.shape[-1])
        output = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
        log_sum_exp = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
        for rows in tiles(q.shape[-2], QUERY_TILE):
            Q_i = q[..., rows, :].to(wide)
            m_i = torch.full(Q_i.shape[:-1], -math.inf, dtype=wide, device=q.device)
            l_i = torch.zeros_like(m_i)
            O_i = torch.zeros((*Q_i.shape[:-1], v.shape[-1]), dtype=wide, device=q.device)
            for columns in visible_tiles(rows, k.shape[-2], is_causal):
                K_j, V_j = k[..., columns, :].to(wide), v[..., columns, :].to(wide)
                S_ij = scores(Q_i, K_j, rows, columns, scale, is_causal)
                m_new = torch.maximum(m_i, S_ij.amax(dim=-1))
                P_ij = torch.exp(S_ij - m_new.unsqueeze(-1))
                rescale = torch.exp(m_i - m_new)
                l_i = rescale * l_i + P_ij.sum(dim=-1)
                O_i = rescale.unsqueeze(-1) * O_i + P_ij @ V_j
                m_i = m_new
            output[..., rows, :] = (O_i / l_i.unsqueeze(-1)).to(q.dtype)
            log_sum_exp[..., rows] = m_i + torch.log(l_i)
        ctx.save_for_backward(q, k, v, output, log_sum_exp)
        ctx.is_causal = is_causal
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, output, log_sum_exp = ctx.saved_tensors
        wide = log_sum_exp.dtype
        scale = 1 / math.sqrt(q.shape[-1])
        dQ, dK, dV = (torch.zeros(tensor.shape, dtype=wide, device=q.device) for tensor in (q, k, v))
        D = (grad_output.to(wide) * output.to(wide)).sum(dim=-1)
        for rows in tiles(q.shape[-2], QUERY_TILE):
            Q_i, dO_i = q[..., rows, :].to(wide), grad_output[..., rows, :].to(wide)
            for columns in visible_tiles(rows, k.shape[-2], ctx.is_causal):
                K_j, V_j = k[..., columns, :].to(wide), v[..., columns, :].to(wide)
                S_ij = scores(Q_i, K_j, rows, columns, scale, ctx.is_causal)
                P_ij = torch.exp(S_ij - log_sum_exp[..., rows].unsqueeze(-1))
                dP_ij = dO_i @ V_j.transpose(-2, -1)
                dS_ij = P_ij * (dP_ij - D[..., rows].unsqueeze(-1)) * scale
                dQ[..., rows, :] += dS_ij @ K_j
                dK[..., columns, :] += dS_ij.transpose(-2, -1) @ Q_i
                dV[..., columns, :] += P_ij.transpose(-2, -1) @ dO_i
        return dQ.to(q.dtype), dK.to(k.dtype), dV.to(v.dtype), None


def tiles(length: int, size: int) -> Iterator[slice]:
    """0..length in pieces of `size`; the last may be shorter."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def visible_tiles(rows: slice, keys: int, is_causal: bool) -> Iterator[slice]:
    """The key tiles of which these queries see at least one key."""
    return tiles(min(keys, rows.stop) if is_causal else keys, KEY_TILE)


def scores(Q_i: Tensor, K_j: Tensor, rows: slice, columns: slice, scale: float, is_causal: bool) -> Tensor:
    """The scores of one tile; those of the future are -inf."""
    S_ij = Q_i @ K_j.transpose(-2, -1) * scale
    if not is_causal or columns.stop <= rows.start + 1:
        return S_ij
    query = torch.arange(rows.start, rows.stop, device=Q_i.device)
    key = torch.arange(columns.start, columns.stop, device=Q_i.device)
    return S_ij.masked_fill(key > query.unsqueeze(-1), -math.inf)
