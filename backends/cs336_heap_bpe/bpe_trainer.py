"""Byte-pair training without a compiler: counting in processes, merging over numpy arrays (see pair_merger.py)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cs336_registry.components.bpe_trainer import TieBreak, check, check_counts, initial_vocab
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.progress import Progress
from cs336_registry.text.training_cache import CHECKPOINT_EVERY, TrainingCache, WordCounts
from cs336_registry.text.vocab_files import Merges, Vocab

from .accumulator import bytes_of
from .pair_merger import PairMerger
from .pretoken_counter import count_words, open_cache
from .workers import check_num_workers

logger = logging.getLogger(__name__)


def bpe_trainer(
    input_path: InputPath,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    tie_break: TieBreak = "greatest_bytes",
    num_workers: int | None = None,
    cache_dir: StrPath | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    max_ram: int | str | None = None,
    progress: bool | None = None,
) -> tuple[Vocab, Merges]:
    """The contract's vocab and merges; the same for any number of workers, and after any interruption.

    num_workers, cache_dir, max_ram, progress: as in `pretoken_counter`. With a cache_dir the merges are kept every
    `checkpoint_every` merges and at the end; a later run on the same corpus, of any vocab_size, goes on from them.
    """
    paths, special_tokens = check(input_path, vocab_size, special_tokens, pattern, tie_break)
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}: it must be at least 1 merge")
    workers, budget = check_num_workers(num_workers), bytes_of(max_ram)
    cache = open_cache(cache_dir, paths, special_tokens, pattern)
    words = count_words(paths, special_tokens, pattern, workers, cache, budget, bool(progress))
    check_counts(words.counts, input_path)
    return train(words, vocab_size, special_tokens, tie_break, cache, checkpoint_every, bool(progress))


def train(
    words: WordCounts,
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    tie_break: TieBreak = "greatest_bytes",
    cache: TrainingCache | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    progress: bool = False,
) -> tuple[Vocab, Merges]:
    """The merge phase alone, from counted words."""
    vocab = initial_vocab(special_tokens)
    known = set(vocab.values())
    merges: Merges = []

    def accept(pair: tuple[bytes, bytes]) -> None:
        merges.append(pair)
        if pair[0] + pair[1] not in known:
            known.add(pair[0] + pair[1])
            vocab[len(vocab)] = pair[0] + pair[1]

    for pair in cache.load_merges(tie_break) if cache is not None else ():
        if len(vocab) >= vocab_size:
            break
        accept(pair)
    if len(vocab) >= vocab_size:
        return vocab, merges
    merger = PairMerger(words, tie_break)
    if cache is not None and not merges:
        cache.save_pair_counts(merger.byte_pair_counts())
    merger.replay(merges)
    with Progress("merging", vocab_size - 256 - len(special_tokens), "merges", enabled=progress) as report:
        report.resume(len(merges))
        while len(vocab) < vocab_size and (found := merger.next_pair()) is not None:
            accept(merger.merge(found[0]))
            report.update(len(merges))
            if cache is not None and len(merges) % checkpoint_every == 0:
                cache.save_checkpoint(merges, vocab, tie_break)
    if cache is not None:
        cache.save_checkpoint(merges, vocab, tie_break)
    return vocab, merges
