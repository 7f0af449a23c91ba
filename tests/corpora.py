"""Text for the tests of the text side: real English that every Python brings, and small trained vocabularies."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

from cs336_registry.components import bpe_trainer
from cs336_registry.text import samples
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.vocab_files import Merges, Vocab

SPECIAL_TOKENS = [samples.END_OF_TEXT, "<|pad|>"]


@lru_cache
def english(characters: int = 130_000) -> str:
    """The reference manual's topics as the interpreter's help() shows them, with documents told apart."""
    from pydoc_data.topics import topics

    text = samples.END_OF_TEXT.join(topics[name] for name in sorted(topics))
    return (text * (1 + characters // len(text)))[:characters]


@lru_cache
def vocabulary(pattern: str = GPT2_PATTERN) -> tuple[Vocab, Merges]:
    """A vocabulary of 600 from the contract's own oracle: no backend is judged by itself."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text(english(20_000) + samples.tricky(500, seed=1), encoding="utf-8", newline="")
        return bpe_trainer.oracle(corpus, 600, SPECIAL_TOKENS, pattern=pattern)
