"""A corpus of made-up sentences and a model small enough to train in a second."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cs336_registry.pipeline.configuration import Configuration, load

WORDS = [
    "the",
    "a",
    "one",
    "cat",
    "dog",
    "bird",
    "tree",
    "house",
    "sees",
    "finds",
    "likes",
    "and",
    "or",
    "under",
    "over",
    "near",
    "red",
    "small",
    "old",
    "quick",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on two threads, and bit-for-bit comparisons need the same number everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of a few sentences."""
    generator = random.Random(336)
    documents = []
    for _ in range(40):
        sentences = [" ".join(generator.choices(WORDS, k=generator.randint(4, 9))) for _ in range(12)]
        documents.append(". ".join(sentences).capitalize() + ".")
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


TINY = (
    "text_backend=reference",
    "model.vocab_size=280",
    "model.context_length=16",
    "model.d_model=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.d_ff=32",
    "training.batch_size=4",
    "training.steps=12",
    "schedule.warmup_steps=3",
    "evaluation.every=6",
    "evaluation.sequences=8",
    "evaluation.final_sequences=32",
    "evaluation.sample_tokens=8",
    "checkpoint.every=5",
)


@pytest.fixture(scope="session")
def tiny(corpus_path: Path):
    """tiny("optimizer.lr=1") is the small configuration with that changed."""

    def configure(*settings: str) -> Configuration:
        return load("quickstart", [*TINY, f'data.train="{corpus_path}"', "data.validation_fraction=0.2", *settings])

    return configure
