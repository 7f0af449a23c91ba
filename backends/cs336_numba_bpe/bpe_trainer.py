"""Training with the compiled scanner and merge loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cs336_registry.components.bpe_trainer import TieBreak, check, check_counts, initial_vocab
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.progress import Progress
from cs336_registry.text.vocab_files import Merges, Vocab

from .corpus import Options, count_corpus, make_options
from .small import train_merges

if TYPE_CHECKING:
    from .count_table import WordCounts

PROGRESS_EVERY = 1000
SAVING_SHARE = 0.1
"""A due checkpoint is passed over where keeping them would take more than this share of the time: this engine makes 300
merges in milliseconds, and writing them out takes longer than making them again."""


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
    max_ram: int | str | None = None,
    progress: bool | None = None,
) -> tuple[Vocab, Merges]:
    """See the contract; the same result for any number of threads and after any interruption.

    num_threads, cache_dir, max_ram, progress: as for `pretoken_counter`. With a cache_dir, merges are kept every
    `checkpoint_every` merges and at the end; a later run on the same corpus, of any vocab_size, goes on from them.
    """
    paths, tokens = check(input_path, vocab_size, special_tokens, pattern, tie_break)
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}: it must be at least 1 merge")
    options = make_options(paths, tokens, pattern, num_threads, cache_dir, max_ram, progress)
    num_merges = vocab_size - 256 - len(tokens)
    kept = [] if options.cache is None else options.cache.load_merges(tie_break)[:num_merges]
    if kept and len(kept) == num_merges:
        return _with_vocab(kept, tokens)
    counts = count_corpus(paths, tokens, pattern, options, ("count", "merge"), vocab_size)
    check_counts(counts if isinstance(counts, dict) else {b"": len(counts)} if len(counts) else {}, input_path)
    if isinstance(counts, dict):
        merges = train_merges(counts, num_merges, tie_break)
        if options.cache is not None:
            options.cache.save_checkpoint(merges, _with_vocab(merges, tokens)[0], tie_break)
    else:
        merges = _train_compiled(counts, num_merges, tokens, tie_break, kept, checkpoint_every, options)
    return _with_vocab(merges, tokens)


def _with_vocab(merges: Merges, special_tokens: Sequence[str]) -> tuple[Vocab, Merges]:
    vocab = initial_vocab(special_tokens)
    vocab.update(enumerate((left + right for left, right in merges), start=len(vocab)))
    return vocab, merges


def _train_compiled(
    words: WordCounts,
    num_merges: int,
    special_tokens: Sequence[str],
    tie_break: str,
    kept: Merges,
    checkpoint_every: int,
    options: Options,
) -> Merges:
    """Merge in strides, so that checkpoints and reports come in between."""
    from .merge_engine import MergeEngine

    engine = MergeEngine(words, 256 + num_merges, tie_break=tie_break, announce=options.announce)
    stride = checkpoint_every if options.cache is not None else PROGRESS_EVERY if options.progress else num_merges
    if options.cache is not None and not kept:
        options.cache.save_pair_counts(engine.byte_pair_counts())
    with Progress("merging", num_merges, "merges", enabled=options.progress) as progress:
        engine.replay(kept)
        progress.resume(engine.merges_done)
        last_saved, saving_took = time.monotonic(), 0.0
        more = True
        while more and engine.merges_done < num_merges:
            more = engine.run(min(num_merges, (engine.merges_done // stride + 1) * stride))
            progress.update(engine.merges_done)
            is_last = not more or engine.merges_done == num_merges
            waited = time.monotonic() - last_saved
            if options.cache is not None and (is_last or waited >= saving_took / SAVING_SHARE):
                started = time.monotonic()
                merges = engine.merges()
                options.cache.save_checkpoint(merges, _with_vocab(merges, special_tokens)[0], tie_break)
                last_saved = time.monotonic()
                saving_took = last_saved - started
    return engine.merges()
