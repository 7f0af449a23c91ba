"""Texts that a trained model writes: prompts in, continuations out, streamed where somebody watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .decoding import Sampling, Speed, TextStream, stream
from .tokenization import RunTokenizer
from .trained import TrainedModel

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Completion:
    """One continuation. text: what was written after the prompt, without the stop token."""

    prompt: str
    sample: int
    text: str
    tokens: int
    stopped: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def complete(
    trained: TrainedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    samples: int = 1,
    stop: Sequence[str] = (),
    use_cache: bool = True,
    watch: Watch | None = None,
    speed: Speed | None = None,
) -> Iterator[list[Completion]]:
    """For each prompt `samples` continuations, computed as one batch.

    An empty prompt starts a new document. The end-of-text token always stops a row, and so do the tokens of `stop`.
    Prompt number n draws from seed + n, so its texts do not depend on the other prompts. watch is called with each
    piece of the first row's text.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}: ask for at least 1")
    tokenizer = trained.tokenizer
    end = tokenizer.end_of_text_id
    stops = {*([] if end is None else [end]), *(stop_token(tokenizer, text) for text in stop)}
    for number, prompt in enumerate(prompts):
        ids = tokenizer.tokenizer.encode(prompt) or ([] if end is None else [end])
        if not ids:
            raise ValueError("this tokenizer has no end-of-text token to begin a document with: pass a prompt")
        batch = torch.tensor([ids] * samples, dtype=torch.int64, device=trained.device)
        steps = stream(
            trained.model,
            batch,
            trained.components["generate"],
            replace(sampling, seed=sampling.seed + number),
            stop_token_ids=stops,
            use_cache=use_cache,
            speed=speed,
        )
        rows = [_Row(tokenizer) for _ in range(samples)]
        for chosen in steps:
            for row, token_id in zip(rows, chosen, strict=True):
                row.push(token_id, stops, watch if row is rows[0] else None)
        yield [row.completion(prompt, n, watch if n == 0 else None) for n, row in enumerate(rows)]


def stop_token(tokenizer: RunTokenizer, text: str) -> int:
    """The id of a stop text, which must be a single token."""
    ids = tokenizer.tokenizer.encode(text)
    if len(ids) != 1:
        pieces = [tokenizer.tokenizer.decode([token_id]) for token_id in ids]
        raise ValueError(
            f"stop text {text!r} is {len(ids)} tokens of this tokenizer ({pieces}): choose one that is a single token"
        )
    return ids[0]


class _Row:
    """One row of a batch until it stops."""

    def __init__(self, tokenizer: RunTokenizer) -> None:
        self.decoder = TextStream(tokenizer.tokenizer.vocab)
        self.pieces: list[str] = []
        self.tokens, self.stopped = 0, False

    def push(self, token_id: int, stops: set[int], watch: Watch | None) -> None:
        if self.stopped:
            return
        self.tokens += 1
        self.stopped = token_id in stops
        if not self.stopped:
            self._add(self.decoder.push(token_id), watch)

    def completion(self, prompt: str, number: int, watch: Watch | None) -> Completion:
        self._add(self.decoder.finish(), watch)
        return Completion(prompt, number, "".join(self.pieces), self.tokens, self.stopped)

    def _add(self, piece: str, watch: Watch | None) -> None:
        self.pieces.append(piece)
        if watch is not None and piece:
            watch(piece)
