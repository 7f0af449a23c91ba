"""Generation with a KV cache, one token at a time: the same tokens as the `generate` component makes without one.

Every step is a call of that component for one new token, on a model that remembers what it has seen, so sampling is the
chosen backend's own. Beyond the context length the component gives the model the last window of tokens, each at a new
position: nothing that was cached is valid then, and every token costs a whole window.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..components.generate import check


@dataclass
class Speed:
    """What streams have taken so far, summed. Prefill reads the prompt and makes the first token of each row."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        parts = [_rate("prefill", self.prefill_tokens, self.prefill_seconds)]
        parts += [_rate("decode", self.decoded_tokens, self.decode_seconds)] if self.decoded_tokens else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; see the contract of `generate`."""

    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0

    def check(self) -> None:
        """Refuse what no model can do, before the first word is written."""
        prompt = torch.zeros(1, 1, dtype=torch.int64)
        check(prompt, self.max_new_tokens, self.temperature, self.top_k, self.top_p, None)


@torch.no_grad()
def stream(
    model: Any,
    prompt: Tensor,
    generate: Callable[..., Tensor],
    sampling: Sampling,
    *,
    stop_token_ids: Collection[int] = (),
    use_cache: bool = True,
    speed: Speed | None = None,
) -> Iterator[list[int]]:
    """One list of new tokens, a token a row, for every step, until all rows have made a stop token.

    prompt: (batch, tokens). A finished row repeats its stop token. A model without `new_cache` is run without a cache.
    """
    check(prompt, sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, None)
    speed = Speed() if speed is None else speed
    generator = torch.Generator(prompt.device).manual_seed(sampling.seed)
    one_token = partial(
        generate,
        max_new_tokens=1,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        generator=generator,
    )
    stops = torch.tensor(sorted(stop_token_ids), dtype=torch.int64, device=prompt.device)
    window = model.context_length
    tokens, finished = prompt.long(), torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    cache = model.new_cache() if use_cache and hasattr(model, "new_cache") else None
    for step in range(sampling.max_new_tokens):
        start = time.perf_counter()
        if cache is not None and tokens.shape[1] <= window:
            given, forward = tokens[:, cache.length :], partial(model, cache=cache)
        else:
            given, forward, cache = tokens[:, -window:], partial(model), None
        chosen = one_token(forward, given)[:, -1]
        chosen = torch.where(finished, tokens[:, -1], chosen)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        finished = finished | torch.isin(chosen, stops)
        found = chosen.tolist()
        _count(speed, step, given.numel(), len(found), time.perf_counter() - start)
        yield found
        if bool(finished.all()):
            return


class TextStream:
    """Tokens to text as they come: bytes that do not make a whole character yet are held back.

    The pieces joined are what the tokenizer decodes all ids to; ids that it does not have are left out.
    """

    def __init__(self, vocab: Mapping[int, bytes]) -> None:
        self.vocab = vocab
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        return self._decoder.decode(self.vocab.get(token_id, b""))

    def finish(self) -> str:
        """U+FFFD where the last bytes never became a character, else nothing."""
        return self._decoder.decode(b"", final=True)


def _count(speed: Speed, step: int, given: int, rows: int, seconds: float) -> None:
    if step == 0:
        speed.prefill_tokens += given
        speed.prefill_seconds += seconds
    else:
        speed.decoded_tokens += rows
        speed.decode_seconds += seconds


def _rate(name: str, tokens: int, seconds: float) -> str:
    return f"{name} {tokens:,} tokens in {seconds:.2f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s"
