"""The embedding table: indexing picks a row per token."""

from __future__ import annotations

from torch import Tensor

from cs336_registry.components.embedding import check


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    check(token_ids, weight)
    rows = weight[token_ids.reshape(-1).long()]
    return rows.reshape(*token_ids.shape, weight.shape[1])
