"""The embedding table through `F.embedding`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cs336_registry.components.embedding import check


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    check(token_ids, weight)
    return F.embedding(token_ids.long(), weight)
