"""Training with the compiled scanner and merge loop."""

from __future__ import annotations

from collections.abc import Sequence

from cs336_registry.components.bpe_trainer import TieBreak, check, check_counts, initial_vocab
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.vocab_files import Merges, Vocab

from .corpus import count_corpus
from .small import train_merges


def bpe_trainer(
    input_path: InputPath,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    tie_break: TieBreak = "greatest_bytes",
    num_threads: int | None = None,
    cache_dir: StrPath | None = None,
    checkpoint_every: int = 300,
    max_ram: int | None = None,
    progress: bool | None = None,
) -> tuple[Vocab, Merges]:
    """See the contract; options as for `pretoken_counter`, and checkpoint_every: merges between two checkpoints."""
    paths, tokens = check(input_path, vocab_size, special_tokens, pattern, tie_break)
    counts = count_corpus(
        paths, tokens, pattern, num_threads=num_threads, max_ram=max_ram, small_groups=("count", "merge")
    )
    vocab = initial_vocab(tokens)
    num_merges = vocab_size - len(vocab)
    if isinstance(counts, dict):
        check_counts(counts, input_path)
        merges = train_merges(counts, num_merges, tie_break)
    else:
        from .merge_engine import MergeEngine

        check_counts({b"": 1} if len(counts) else {}, input_path)
        engine = MergeEngine(counts, 256 + num_merges, tie_break=tie_break)
        del counts
        engine.run(num_merges, 256 + num_merges)
        made = engine.tokens()
        merges = [(made[left], made[right]) for left, right, _ in engine.merges()]
    vocab.update(enumerate((left + right for left, right in merges), start=len(vocab)))
    return vocab, merges
