"""Sampling with a buffer made once and torch.searchsorted; rows are sorted only where sampling needs their order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cs336_registry.components.generate import check, check_logits, window_of


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Iterable[int] = (),
    generator: torch.Generator | None = None,
    context_length: int | None = None,
) -> Tensor:
    """See the contract. Without stop tokens no step waits to learn whether all rows are finished."""
    check(prompt, max_new_tokens, temperature, top_k, top_p, context_length)
    window = window_of(model, context_length)
    batch, length = prompt.shape
    tokens = torch.empty(batch, length + max_new_tokens, dtype=torch.int64, device=prompt.device)
    tokens[:, :length] = prompt
    stops = torch.tensor(sorted(stop_token_ids), dtype=torch.int64, device=prompt.device)
    finished = torch.zeros(batch, dtype=torch.bool, device=prompt.device)
    for end in range(length, length + max_new_tokens):
        if batch == 0 or (len(stops) and bool(finished.all())):
            return tokens[:, :end].clone()
        given = tokens[:, 0 if window is None else max(0, end - window) : end]
        logits = model(given)
        check_logits(logits, given)
        chosen = _choose(logits[:, -1], temperature, top_k, top_p, generator)
        tokens[:, end] = torch.where(finished, tokens[:, end - 1], chosen)
        finished |= torch.isin(tokens[:, end], stops)
    return tokens


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)  # The first of equals, as the contract wants.
    logits, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    probabilities = torch.softmax(logits[:, :top_k] / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    kept = torch.full((len(logits), 1), probabilities.shape[-1], device=logits.device)
    if top_p is not None:
        kept = (cumulative - probabilities < top_p).sum(dim=-1, keepdim=True)
    source = logits.device if generator is None else generator.device
    draws = torch.rand(len(logits), dtype=torch.float64, generator=generator, device=source).to(logits.device)
    aim = draws[:, None] * cumulative.gather(-1, kept - 1)
    choice = torch.searchsorted(cumulative, aim, right=True).minimum(kept - 1)
    return ids.gather(-1, choice).squeeze(-1)
