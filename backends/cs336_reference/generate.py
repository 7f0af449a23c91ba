"""Sampling from a language model: one forward pass and one choice per new token, without a cache."""

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
    """See the contract."""
    check(prompt, max_new_tokens, temperature, top_k, top_p, context_length)
    window = window_of(model, context_length)
    tokens = prompt.long()
    stops = torch.tensor(sorted(stop_token_ids), dtype=torch.int64, device=prompt.device)
    finished = torch.zeros(len(tokens), dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        if bool(finished.all()):
            break
        given = tokens if window is None else tokens[:, -window:]
        logits = model(given)
        check_logits(logits, given)
        chosen = choose(logits[:, -1], temperature, top_k, top_p, generator)
        chosen = torch.where(finished, tokens[:, -1], chosen)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        finished = finished | torch.isin(chosen, stops)
    return tokens


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of `logits`, (batch, vocab) to (batch,)."""
    # A stable sort puts equal logits in the order of their ids.
    logits, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    if temperature == 0:
        return ids[:, 0]
    probabilities = torch.softmax(logits[:, :top_k] / temperature, dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    if top_p is not None:
        # A token stays where the more probable ones before it do not reach top_p; the first one always does.
        probabilities = torch.where(cumulative - probabilities < top_p, probabilities, 0.0)
        cumulative = probabilities.cumsum(dim=-1)
    source = logits.device if generator is None else generator.device
    draws = torch.rand(len(logits), dtype=torch.float64, generator=generator, device=source).to(logits.device)
    aim = draws[:, None] * cumulative[:, -1:]
    # Rounding may leave an aim that no sum exceeds: the last token that is kept stands in.
    last_kept = (probabilities > 0).sum(dim=-1) - 1
    choice = torch.minimum((cumulative <= aim).sum(dim=-1), last_kept)
    return ids.gather(-1, choice[:, None]).squeeze(-1)
