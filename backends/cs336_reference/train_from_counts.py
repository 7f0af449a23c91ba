"""Training from words that were counted before."""

from __future__ import annotations

from collections.abc import Sequence

from cs336_registry.components.bpe_trainer import TieBreak
from cs336_registry.text.training_cache import WordCounts
from cs336_registry.text.vocab_files import Merges, Vocab

from .bpe_trainer import train


def train_from_counts(
    words: WordCounts, vocab_size: int, special_tokens: Sequence[str] = (), *, tie_break: TieBreak = "greatest_bytes"
) -> tuple[Vocab, Merges]:
    """What `bpe_trainer` returns for the corpus that `words` are the counts of."""
    return train(words.to_dict(), vocab_size, special_tokens, tie_break)
