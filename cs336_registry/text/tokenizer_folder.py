"""A tokenizer on disk: GPT-2's vocab.json and merges.txt, and a metadata.json with what those two can't hold.

metadata.json has the pattern (a name, or the expression itself), the special tokens in the order of their ids, how the
tokenizer came about (tie break, corpus, decision), and a fingerprint that everything encoded with it carries. It is
written last: where it is, the other two are complete.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import StrPath, write_json
from .patterns import pattern_from, pattern_name
from .vocab_files import Merges, Vocab, read_merges, read_vocab, write_merges, write_vocab

VOCAB, MERGES, METADATA = "vocab.json", "merges.txt", "metadata.json"


@dataclass(frozen=True)
class StoredTokenizer:
    """What a tokenizer folder holds."""

    vocab: Vocab
    merges: Merges
    metadata: Mapping[str, Any]

    @property
    def pattern(self) -> str:
        """The expression itself."""
        return pattern_from(self.metadata["pattern"])

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return tuple(self.metadata["special_tokens"])

    @property
    def fingerprint(self) -> str:
        return self.metadata["fingerprint"]


def is_there(folder: StrPath) -> bool:
    """Whether `folder` holds a complete tokenizer."""
    return (Path(folder) / METADATA).is_file()


def write(
    folder: StrPath,
    vocab: Mapping[int, bytes],
    merges: Sequence[tuple[bytes, bytes]],
    *,
    pattern: str,
    special_tokens: Sequence[str],
    **more: Any,
) -> StoredTokenizer:
    """Write a tokenizer and read it back; `more` is kept in metadata.json.

    pattern: a name or an expression. Raises ValueError where GPT-2's layout can't hold the vocab (two ids with the same
    bytes, or a special token that reads as another token).
    """
    folder = Path(folder)
    name = pattern_name(pattern_from(pattern))
    (folder / METADATA).unlink(missing_ok=True)
    write_vocab(vocab, folder / VOCAB)
    write_merges(merges, folder / MERGES)
    metadata = {
        **more,
        "pattern": name,
        "special_tokens": list(special_tokens),
        "fingerprint": fingerprint(vocab, merges, special_tokens, name),
        "tokens": len(vocab),
        "merges": len(merges),
    }
    stored = _read_files(folder, metadata)
    if stored.vocab != dict(vocab):
        lost = next(token_id for token_id in vocab if stored.vocab.get(token_id) != vocab[token_id])
        raise ValueError(
            f"{folder / VOCAB} can't hold token {lost} ({vocab[lost]!r}): it reads as {stored.vocab.get(lost)!r} "
            f"there; choose another special token"
        )
    write_json(folder / METADATA, metadata, indent=2)
    return stored


def read(folder: StrPath) -> StoredTokenizer:
    """The tokenizer in `folder`; raises ValueError where its files do not belong together."""
    folder = Path(folder)
    stored = _read_files(folder, read_metadata(folder))
    found = fingerprint(stored.vocab, stored.merges, stored.special_tokens, stored.metadata["pattern"])
    if found != stored.fingerprint:
        raise ValueError(
            f"{folder}: vocab.json and merges.txt have fingerprint {found}, metadata.json says {stored.fingerprint}: "
            f"the files were changed or mixed; delete the folder to train it again"
        )
    return stored


def build(builder: Callable[..., Any], stored: StoredTokenizer, folder: StrPath) -> Any:
    """The tokenizer's object; a builder that takes `folder` finds there what else was kept with the tokenizer."""
    more = {"folder": folder} if "folder" in inspect.signature(builder).parameters else {}
    return builder(stored.vocab, stored.merges, list(stored.special_tokens), pattern=stored.pattern, **more)


def read_metadata(folder: StrPath) -> dict[str, Any]:
    """metadata.json alone."""
    path = Path(folder) / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer in {folder}: expected vocab.json, merges.txt and metadata.json")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        needed = {key: metadata[key] for key in ("fingerprint", "pattern", "special_tokens")}
        return {**metadata, **needed}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} can't be read ({error}): delete the folder to train the tokenizer again") from None


def fingerprint(
    vocab: Mapping[int, bytes], merges: Iterable[tuple[bytes, bytes]], special_tokens: Iterable[str], pattern: str
) -> str:
    """Sixteen hexadecimal digits that change whenever any text could be encoded otherwise."""
    content = [
        sorted((token_id, token.hex()) for token_id, token in vocab.items()),
        [[left.hex(), right.hex()] for left, right in merges],
        list(special_tokens),
        pattern,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read_files(folder: Path, metadata: Mapping[str, Any]) -> StoredTokenizer:
    vocab = read_vocab(folder / VOCAB, metadata["special_tokens"])
    return StoredTokenizer(vocab, read_merges(folder / MERGES), metadata)
