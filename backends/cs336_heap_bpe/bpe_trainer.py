"""Byte-pair training without a compiler: counting in processes, merging over numpy arrays (see pair_merger.py)."""

from __future__ import annotations

from collections.abc import Sequence

from cs336_registry.components.bpe_trainer import TieBreak, check, check_counts, initial_vocab
from cs336_registry.text.changes import file_states
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath
from cs336_registry.text.memory import bytes_of
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.progress import Progress
from cs336_registry.text.training_cache import CHECKPOINT_EVERY, TrainingCache, WordCounts
from cs336_registry.text.vocab_files import Merges, Vocab

from .memory_plan import Ceiling
from .pair_merger import PairMerger
from .pretoken_counter import count_words, open_cache
from .workers import check_num_workers


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
    Raises MemoryError where merging can't be kept under max_ram: before counting where a sample shows it, else when the
    words are counted (and in the cache).
    """
    paths, special_tokens = check(input_path, vocab_size, special_tokens, pattern, tie_break)
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}: it must be at least 1 merge")
    workers, ceiling = check_num_workers(num_workers), Ceiling(bytes_of(max_ram), progress=bool(progress))
    states = file_states(paths)
    cache = open_cache(cache_dir, paths, special_tokens, pattern)
    words = count_words(paths, special_tokens, pattern, workers, cache, ceiling, states)
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
    vocab, merges = _grown(special_tokens, cache.load_merges(tie_break) if cache is not None else [], vocab_size)
    if len(vocab) >= vocab_size:
        return vocab, merges
    merger = PairMerger(words, tie_break)
    if cache is not None and not merges:
        cache.save_pair_counts(merger.byte_pair_counts())
    try:
        merger.replay(merges)
    except LookupError as error:
        cache.forget_merges(tie_break, error)
        return train(words, vocab_size, special_tokens, tie_break, cache, checkpoint_every, progress)
    known = set(vocab.values())
    with Progress("merging", vocab_size - 256 - len(special_tokens), "merges", enabled=progress) as report:
        report.resume(len(merges))
        while len(vocab) < vocab_size and (found := merger.next_pair()) is not None:
            _accept(merger.merge(found[0]), vocab, known, merges)
            report.update(len(merges))
            if cache is not None and len(merges) % checkpoint_every == 0:
                cache.save_checkpoint(merges, vocab, tie_break)
    if cache is not None:
        cache.save_checkpoint(merges, vocab, tie_break)
    return vocab, merges


def _grown(special_tokens: Sequence[str], kept: Merges, vocab_size: int) -> tuple[Vocab, Merges]:
    """The vocab and as many of the kept merges as it has room for."""
    vocab = initial_vocab(special_tokens)
    known, merges = set(vocab.values()), []
    for pair in kept:
        if len(vocab) >= vocab_size:
            break
        _accept(pair, vocab, known, merges)
    return vocab, merges


def _accept(pair: tuple[bytes, bytes], vocab: Vocab, known: set[bytes], merges: Merges) -> None:
    merges.append(pair)
    token = pair[0] + pair[1]
    if token not in known:
        known.add(token)
        vocab[len(vocab)] = token
