"""What a run trains and evaluates on: corpus, tokenizer and tokens, made in that order and kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..machine import detect
from ..text.files import write_json
from . import baselines, corpus, encoding, tokenization, tokens
from .configuration import Configuration
from .corpus import Corpus, Split
from .progress import Progress
from .tokenization import RunTokenizer
from .tokens import Tokens


@dataclass(frozen=True)
class RunData:
    """The corpus, its tokenizer, the tokens of both sides, and the baselines' bits per byte."""

    corpus: Corpus
    tokenizer: RunTokenizer
    train: Tokens
    validation: Tokens
    baselines: dict[str, float]

    def tokenizer_facts(self) -> dict[str, Any]:
        """What a report says about the tokenizer."""
        metadata = self.tokenizer.metadata
        known = {name: metadata.get(name) for name in ("tokens", "merges", "pattern", "tie_break", "seconds")}
        return known | {
            "fingerprint": self.tokenizer.fingerprint,
            "folder": str(self.tokenizer.folder),
            "train_bytes": self.train.bytes,
            "train_tokens": len(self.train.ids),
            "bytes_per_token": {"train": self.train.bytes_per_token, "validation": self.validation.bytes_per_token},
            "longest_tokens": self.tokenizer.longest_tokens(),
            "longest_words": self.tokenizer.longest_tokens(with_letters=True),
        }


def prepare(configuration: Configuration, folder: Path, progress: Progress) -> RunData:
    """Corpus, tokenizer and tokens under `folder`, each made unless it is there already."""
    if configuration.data.is_encoded:
        return _encoded(configuration, folder)
    backend = configuration.text_backend or configuration.backend
    tokenization.check_backend(configuration, folder / "tokenizer")
    text = corpus.prepare(configuration.data, configuration.tokenizer.special_tokens[0], folder, progress)
    tokenizer = tokenization.prepare(configuration, text, folder / "tokenizer", progress)
    sides = {}
    for name, split in (("train", text.train), ("validation", text.validation)):
        path = folder / f"{name}.npy"
        is_new = not path.is_file()
        sides[name] = tokens.prepare(split, tokenizer, path, progress, workers=detect().cpu_count, backend=backend)
        # Of what was copied it was told then.
        if is_new and split.path.parent != folder.absolute():
            encoding.tell_malformed(split.path, sides[name], tokenizer, progress)
    train, validation = sides["train"], sides["validation"]
    with open(text.validation.path, "rb") as file:
        sample = file.read(baselines.COMPRESSED_BYTES)
    return RunData(text, tokenizer, train, validation, _baselines(folder, text, train, validation, sample))


def _encoded(configuration: Configuration, folder: Path) -> RunData:
    """Tokens that `cs336 data encode` wrote; refused where they are of another tokenizer, or damaged."""
    tokenizer = tokenization.adopt(configuration, Path(configuration.tokenizer.path or ""))
    paths = Path(str(configuration.data.train)), Path(str(configuration.data.validation))
    train, validation = (tokens.read(path, tokenizer.fingerprint) for path in paths)
    sides = (Split(one.path.absolute(), one.documents, one.bytes, one.text_sha256) for one in (train, validation))
    text = Corpus(", ".join(path.name for path in paths), *sides)
    sample = tokenizer.text(validation.ids, baselines.COMPRESSED_BYTES)
    return RunData(text, tokenizer, train, validation, _baselines(folder, text, train, validation, sample))


def _baselines(folder: Path, text: Corpus, train: Tokens, validation: Tokens, sample: bytes) -> dict[str, float]:
    """Computed once for these tokens: compressing takes seconds."""
    path = folder / "baselines.json"
    identity = {"validation_sha256": text.validation.sha256, "tokens": [len(train.ids), len(validation.ids)]}
    if path.is_file() and (content := json.loads(path.read_text(encoding="utf-8")))["of"] == identity:
        return content["bits_per_byte"]
    found = baselines.compute(train.ids, validation.ids, sample, validation.bytes)
    write_json(path, {"of": identity, "bits_per_byte": found}, indent=2)
    return found
