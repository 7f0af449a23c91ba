"""Word counts on their way to the cache, which all text backends share and which wants them sorted, and back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cs336_registry.text.training_cache import WordCounts as KeptCounts

from .count_table import WordCounts


def load_words(kept: KeptCounts | None) -> WordCounts | None:
    if kept is None:
        return None
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept.lengths, dtype=np.int64)])
    return WordCounts(np.frombuffer(kept.text + bytes(16), np.uint8), starts, kept.counts.astype(np.int64))


def save_words(save: Callable[[KeptCounts], None], words: WordCounts) -> None:
    content = words.words()
    order = sorted(range(len(content)), key=content.__getitem__)
    lengths = np.diff(words.word_starts)[order].astype(np.uint32)
    save(KeptCounts(b"".join([content[word] for word in order]), lengths, np.asarray(words.counts)[order]))
