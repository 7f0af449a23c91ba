"""GPT-2's vocab.json and merges.txt, in a folder. They hold no pattern: every reader takes GPT-2's."""

from __future__ import annotations

from pathlib import Path

from ..patterns import GPT2_PATTERN
from ..tokenizer_folder import MERGES, VOCAB, StoredTokenizer
from ..vocab_files import read_merges, read_vocab, write_merges, write_vocab
from . import Encode, Foreign, needs

LIBRARY = "tokenizers"


def write(stored: StoredTokenizer, path: Path) -> list[Path]:
    if stored.pattern != GPT2_PATTERN:
        raise ValueError(
            f"vocab.json and merges.txt are read with GPT-2's pattern, this tokenizer's is "
            f"{stored.metadata['pattern']!r}: export to hf or tiktoken, which keep it"
        )
    write_vocab(stored.vocab, path / VOCAB)
    write_merges(stored.merges, path / MERGES)
    return [path / VOCAB, path / MERGES]


def read(path: Path, special_tokens: tuple[str, ...] = (), pattern: str | None = None) -> Foreign:
    """The tokenizer in the folder `path`; special tokens that it lacks are added with new ids."""
    vocab = read_vocab(path / VOCAB, special_tokens)
    merges = read_merges(path / MERGES)
    known = set(vocab.values())
    added = [token.encode() for token in special_tokens if token.encode() not in known]
    vocab |= dict(enumerate(added, start=max(vocab, default=-1) + 1))
    return Foreign(vocab, merges, special_tokens, pattern or GPT2_PATTERN)


def encoder(path: Path, stored: StoredTokenizer | Foreign) -> Encode:
    """Hugging Face's reader of these files."""
    tokenizers = needs(LIBRARY, "reading GPT-2's files with Hugging Face's library")
    model = tokenizers.models.BPE.from_file(str(path / VOCAB), str(path / MERGES))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in stored.special_tokens]
    )
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids
