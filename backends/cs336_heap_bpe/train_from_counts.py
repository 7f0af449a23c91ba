"""Training from words that were counted before, on other machines for one."""

from __future__ import annotations

from collections.abc import Sequence

from cs336_registry.components.bpe_trainer import TieBreak
from cs336_registry.text.training_cache import CHECKPOINT_EVERY, TrainingCache, WordCounts
from cs336_registry.text.vocab_files import Merges, Vocab

from .bpe_trainer import train


def train_from_counts(
    words: WordCounts,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    tie_break: TieBreak = "greatest_bytes",
    cache: TrainingCache | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    progress: bool | None = None,
) -> tuple[Vocab, Merges]:
    """What `bpe_trainer` returns for the corpus that `words` are the counts of."""
    return train(words, vocab_size, special_tokens, tie_break, cache, checkpoint_every, bool(progress))
