"""Text from a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .tokenization import RunTokenizer


def sample(
    model: torch.nn.Module,
    tokenizer: RunTokenizer,
    generate: Callable[..., Any],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    context_length: int,
    temperature: float = 0.8,
    top_p: float | None = 0.95,
    seed: int = 0,
    device: str = "cpu",
) -> list[str]:
    """Continue every prompt until the end-of-text token; the results begin with the prompt. An empty prompt starts a
    new document, which needs a tokenizer with an end-of-text token. The same seed gives the same text.
    """
    ends = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    texts = []
    for number, prompt in enumerate(prompts):
        prompt_ids = tokenizer.tokenizer.encode(prompt) or ends
        if not prompt_ids:
            raise ValueError("an empty prompt needs an end-of-text token, which this tokenizer lacks: write a prompt")
        with torch.no_grad():
            ids = generate(
                model,
                torch.tensor([prompt_ids], dtype=torch.int64, device=device),
                max_new_tokens,
                temperature=temperature,
                top_p=None if top_p == 1 else top_p,
                stop_token_ids=ends,
                generator=torch.Generator(device).manual_seed(seed + number),
                context_length=context_length,
            )[0].tolist()
        new = ids[len(prompt_ids) :]
        new = new[: min((new.index(end) for end in ends if end in new), default=len(new))]
        known = [token for token in new if token < tokenizer.size]
        texts.append(prompt + tokenizer.tokenizer.decode(known))
    return texts
