"""What a model must beat to have learnt something: bits per byte of simple models and of compressors, same text."""

from __future__ import annotations

import lzma
import math
import zlib

import numpy as np

COMPRESSED_BYTES = 8 << 20
COUNTED_TOKENS = 20_000_000
"""Enough for steady numbers in seconds, whatever the size of the corpus."""


def compute(
    train_ids: np.ndarray, validation_ids: np.ndarray, validation_text: bytes, text_bytes: int
) -> dict[str, float]:
    """Bits per byte of the validation text, by name.

    unigram, bigram: token frequencies of the training text (smoothed), for each token alone or given the one before;
    zlib, lzma: the strongest settings of the compressors, which may look back over the whole validation text (zlib:
    32 kB) and learn from it as they go; COMPRESSED_BYTES of it are enough. text_bytes: those of validation_ids.
    """
    text = validation_text[:COMPRESSED_BYTES]
    train_ids, size = train_ids[:COUNTED_TOKENS], max(text_bytes, 1)
    counts = np.bincount(train_ids) if len(train_ids) else np.zeros(1, dtype=np.int64)
    vocab = max(len(counts), int(validation_ids.max()) + 1)
    unigram = (np.pad(counts, (0, vocab - len(counts))) + 1.0) / (counts.sum() + vocab)
    return {
        "unigram": float(-np.log2(unigram[validation_ids]).sum()) / size,
        "bigram": _bigram_bits(train_ids, validation_ids, unigram) / size,
        "zlib": len(zlib.compress(text, 9)) * 8 / len(text),
        "lzma": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) * 8 / len(text),
    }


def _bigram_bits(train_ids: np.ndarray, validation_ids: np.ndarray, unigram: np.ndarray) -> float:
    """Witten-Bell: P(b|a) = (count(ab) + kinds(a) P(b)) / (count(a) + kinds(a)), kinds: different successors."""
    vocab = len(unigram)
    pairs, counts = np.unique(train_ids[:-1].astype(np.int64) * vocab + train_ids[1:], return_counts=True)
    total = np.bincount(pairs // vocab, weights=counts, minlength=vocab)
    kinds = np.bincount(pairs // vocab, minlength=vocab)
    first, second = validation_ids[:-1].astype(np.int64), validation_ids[1:].astype(np.int64)
    wanted = first * vocab + second
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, counts[place], 0)
    weight = np.maximum(kinds[first], 1)
    probability = (seen + weight * unigram[second]) / (total[first] + weight)
    return float(-np.log2(probability).sum()) - math.log2(unigram[validation_ids[0]])
