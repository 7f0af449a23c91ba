"""Training from words that were counted before, on other machines for one."""

from __future__ import annotations

from collections.abc import Sequence

from cs336_registry.components.bpe_trainer import TieBreak
from cs336_registry.text.training_cache import CHECKPOINT_EVERY, TrainingCache
from cs336_registry.text.training_cache import WordCounts as KeptCounts
from cs336_registry.text.vocab_files import Merges, Vocab

from .bpe_trainer import _train_compiled, _with_vocab
from .corpus import Options, is_small
from .kept_counts import load_words
from .small import train_merges

CORPUS_PER_TEXT = 10
"""Bytes of corpus for a byte of distinct pretokens, about: what `is_small` judges is the size of a corpus."""


def train_from_counts(
    words: KeptCounts,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    tie_break: TieBreak = "greatest_bytes",
    cache: TrainingCache | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    progress: bool | None = None,
) -> tuple[Vocab, Merges]:
    """What `bpe_trainer` returns for the corpus that `words` are the counts of."""
    options = Options(cache=cache, progress=bool(progress))
    num_merges = vocab_size - 256 - len(special_tokens)
    kept = [] if cache is None else cache.load_merges(tie_break)[:num_merges]
    if len(kept) == num_merges:
        return _with_vocab(kept, special_tokens)
    if is_small(CORPUS_PER_TEXT * len(words.text), ("merge",)):
        merges = train_merges(words.to_dict(), num_merges, tie_break)
        if cache is not None:
            cache.save_checkpoint(merges, _with_vocab(merges, special_tokens)[0], tie_break)
    else:
        loaded = load_words(words)
        merges = _train_compiled(loaded, num_merges, special_tokens, tie_break, kept, checkpoint_every, options)
    return _with_vocab(merges, special_tokens)
