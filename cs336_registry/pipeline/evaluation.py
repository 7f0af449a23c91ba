"""Loss, perplexity and bits per byte on the validation tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .process_group import ProcessGroup


@dataclass(frozen=True)
class Evaluation:
    """loss: nats per token. bits_per_byte: all bits divided by the bytes of the text predicted, so that it compares
    across tokenizers and with compressors. tokens: how many were predicted.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], Tensor],
    ids: np.ndarray,
    token_bytes: list[int],
    cross_entropy: Callable[..., Tensor],
    *,
    context_length: int,
    sequences: int,
    batch_size: int,
    device: str,
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Predict `sequences` windows, spread evenly over `ids`, that do not overlap; all of them where there are fewer.

    The first token of a window is not predicted, and each prediction sees at most its window. Sums are in float64. The
    processes of `group` take every so many-th window each, and all get the same result.
    """
    if len(ids) < 2:
        raise ValueError(f"the validation text has {len(ids)} tokens: it needs 2 or more; hold out more text")
    context_length = min(context_length, len(ids) - 1)
    windows = (len(ids) - 1) // context_length
    chosen = np.unique(np.linspace(0, windows - 1, min(sequences, windows)).round().astype(np.int64))
    bytes_of = np.asarray(token_bytes, dtype=np.int64)
    group = group or ProcessGroup()
    own = chosen[group.rank :: group.world_size]
    total_loss, total_bytes = 0.0, 0
    # All make as many forward passes, for which they may need each other: one that has no window left passes any.
    for start in range(0, -(-len(chosen) // group.world_size), batch_size):
        batch = own[start : start + batch_size]
        positions = (batch if len(batch) else chosen[:1]) * context_length
        rows = np.stack([ids[position : position + context_length + 1] for position in positions]).astype(np.int64)
        inputs, targets = torch.from_numpy(rows[:, :-1]).to(device), torch.from_numpy(rows[:, 1:]).to(device)
        losses = cross_entropy(forward(inputs), targets, reduction="none")[: len(batch)]
        total_loss += float(losses.double().sum())
        total_bytes += int(bytes_of[rows[: len(batch), 1:]].sum())
    total_loss, total_bytes = group.total(torch.tensor([total_loss, total_bytes], dtype=torch.float64)).tolist()
    tokens = len(chosen) * context_length
    loss = total_loss / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total_loss / math.log(2) / max(1, total_bytes),
        tokens=tokens,
    )
