"""The run's tokenizer: trained on the training text, or read from a folder, and kept with what it was made from.

A tokenizer folder holds GPT-2's vocab.json and merges.txt and a metadata.json: pattern, tie break, special tokens, the
corpus' checksum, the backend that trained it, and a fingerprint that everything encoded with it carries.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cs336_registry as registry

from ..text import tokenizer_folder
from ..text.patterns import pattern_named
from ..text.progress import duration
from ..text.vocab_files import read_merges, read_vocab
from .configuration import Configuration
from .corpus import Corpus
from .errors import MismatchError
from .progress import Progress

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RunTokenizer:
    """A tokenizer with its identity. `tokenizer` is the component's object: encode, encode_iterable, decode."""

    tokenizer: Any
    folder: Path
    metadata: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return self.metadata["fingerprint"]

    @property
    def end_of_text(self) -> str:
        """The first special token; empty where there is none."""
        return next(iter(self.metadata["special_tokens"]), "")

    @property
    def end_of_text_id(self) -> int | None:
        return next(iter(self.tokenizer.encode(self.end_of_text)), None)

    @property
    def size(self) -> int:
        """The number of ids a model needs: the largest id plus one."""
        return max(self.tokenizer.vocab) + 1

    def token_bytes(self) -> list[int]:
        """Bytes of text that each id stands for, by id; special tokens are not text and count 0."""
        special = {token.encode() for token in self.metadata["special_tokens"]}
        vocab = self.tokenizer.vocab
        return [0 if vocab.get(i, b"") in special else len(vocab.get(i, b"")) for i in range(self.size)]

    def text(self, ids: np.ndarray, most: int) -> bytes:
        """The text of the first ids, cut off at `most` bytes; no more ids are read than that takes."""
        pieces = bytearray()
        for start in range(0, len(ids), 1 << 16):
            pieces += b"".join(map(self.tokenizer.vocab.__getitem__, ids[start : start + (1 << 16)].tolist()))
            if len(pieces) >= most:
                break
        return bytes(pieces[:most])

    def longest_tokens(self, count: int = 12, *, with_letters: bool = False) -> list[str]:
        """The longest learnt tokens as text; with_letters leaves out those of spaces, digits and signs alone."""
        special = {token.encode() for token in self.metadata["special_tokens"]}
        learnt = [token for token in self.tokenizer.vocab.values() if token not in special]
        texts = [token.decode("utf-8", "replace") for token in sorted(learnt, key=lambda t: (-len(t), t))]
        return [text for text in texts if not with_letters or any(map(str.isalpha, text))][:count]


def prepare(configuration: Configuration, corpus: Corpus, folder: Path, progress: Progress) -> RunTokenizer:
    """The tokenizer of `configuration` under `folder`, trained unless it is there already.

    Raises MismatchError where `folder` holds a tokenizer of another corpus or of other settings.
    """
    chosen = configuration.tokenizer
    if chosen.path is not None:
        return adopt(configuration, Path(chosen.path))
    request = {
        "vocab_size": configuration.model.vocab_size,
        "pattern": chosen.pattern,
        "tie_break": chosen.tie_break,
        "special_tokens": list(chosen.special_tokens),
        "corpus_sha256": corpus.train.sha256,
    }
    if (folder / "metadata.json").is_file():
        metadata = _metadata(folder)
        for key, wanted in request.items():
            if metadata.get(key) != wanted:
                raise MismatchError(
                    f"{folder} holds a tokenizer with {key} = {metadata.get(key)!r}, this run wants {wanted!r}: choose "
                    f"another data.folder or --out, or delete {folder}"
                )
        return read(folder, configuration.text_backend or configuration.backend)
    _train(configuration, corpus, folder, request, progress)
    return read(folder, configuration.text_backend or configuration.backend)


def check_backend(configuration: Configuration, folder: Path) -> None:
    """Raises what `prepare` would where the backend can't serve it, without the corpus, which may take long to make."""
    known = configuration.tokenizer.path is not None or (folder / "metadata.json").is_file()
    for component in ("tokenizer",) if known else ("bpe_trainer", "tokenizer"):
        registry.get(component, backend=configuration.text_backend or configuration.backend)


def read(folder: Path, backend: str | None = None) -> RunTokenizer:
    """The tokenizer in `folder`, checked against its fingerprint, built by the backend that `backend` selects."""
    try:
        stored = tokenizer_folder.read(folder)
    except ValueError as error:
        raise MismatchError(str(error)) from None
    tokenizer = tokenizer_folder.build(registry.get("tokenizer", backend=backend), stored, folder)
    return RunTokenizer(tokenizer, folder, stored.metadata)


def _train(
    configuration: Configuration, corpus: Corpus, folder: Path, request: Mapping[str, Any], progress: Progress
) -> None:
    backend = configuration.text_backend or configuration.backend
    decisions = {name: registry.resolve(name, backend=backend) for name in ("bpe_trainer", "tokenizer")}
    trainer = registry.get("bpe_trainer", backend=backend)
    chosen = configuration.tokenizer
    progress.say(
        f"training a tokenizer of {configuration.model.vocab_size:,} tokens on {corpus.train.bytes / 1e6:.1f} MB "
        f"with {decisions['bpe_trainer'].backend} ..."
    )
    start = time.monotonic()
    vocab, merges = trainer(
        corpus.train.path,
        configuration.model.vocab_size,
        list(chosen.special_tokens),
        pattern=pattern_named(chosen.pattern),
        tie_break=chosen.tie_break,
    )
    seconds = time.monotonic() - start
    tokenizer_folder.write(
        folder,
        vocab,
        merges,
        **request,
        seconds=round(seconds, 3),
        decisions={name: decision.to_dict() for name, decision in decisions.items()},
    )
    progress.say(f"tokenizer: {len(vocab):,} tokens, {len(merges):,} merges in {duration(seconds)}")


def adopt(configuration: Configuration, folder: Path) -> RunTokenizer:
    """A tokenizer made elsewhere; files without metadata are taken with the configuration's pattern.

    Raises MismatchError where it has more ids than the model.
    """
    chosen = configuration.tokenizer
    backend = configuration.text_backend or configuration.backend
    if (folder / "metadata.json").is_file():
        return _fitting(read(folder, backend), configuration)
    special_tokens = list(chosen.special_tokens)
    vocab = read_vocab(folder / "vocab.json", special_tokens)
    merges = read_merges(folder / "merges.txt")
    tokenizer = registry.get("tokenizer", backend=backend)
    built = tokenizer(vocab, merges, special_tokens, pattern=pattern_named(chosen.pattern))
    metadata = {
        "pattern": chosen.pattern,
        "tie_break": None,
        "special_tokens": special_tokens,
        "tokens": len(built.vocab),
        "merges": len(merges),
        "fingerprint": tokenizer_folder.fingerprint(dict(built.vocab), merges, special_tokens, chosen.pattern),
        "decisions": {"tokenizer": registry.resolve("tokenizer", backend=backend).to_dict()},
    }
    return _fitting(RunTokenizer(built, folder, metadata), configuration)


def _fitting(tokenizer: RunTokenizer, configuration: Configuration) -> RunTokenizer:
    if tokenizer.size > configuration.model.vocab_size:
        raise MismatchError(
            f"the tokenizer in {tokenizer.folder} has ids up to {tokenizer.size - 1} and model.vocab_size is "
            f"{configuration.model.vocab_size}: set model.vocab_size={tokenizer.size} or more"
        )
    return tokenizer


def _metadata(folder: Path) -> dict[str, Any]:
    try:
        return tokenizer_folder.read_metadata(folder)
    except ValueError as error:
        raise MismatchError(str(error)) from None
