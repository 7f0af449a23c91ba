"""The embedding table: a row per token."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cs336_registry.components.embedding import check


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """`weight[token_ids]` by PyTorch's function for it: the gradient of an index is summed by all threads at once, in
    another order each time."""
    check(token_ids, weight)
    return F.embedding(token_ids.long(), weight)
