"""Counting pretokens in several processes, a byte range at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cs336_registry.components.pretoken_counter import check
from cs336_registry.text.accumulator import Accumulator
from cs336_registry.text.byte_ranges import byte_ranges
from cs336_registry.text.changes import FileStates, file_states, refuse_changed
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath, byte_texts, decoded, is_plain
from cs336_registry.text.memory import bytes_of
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.progress import Progress
from cs336_registry.text.training_cache import TrainingCache, WordCounts, identify

from .counting import count_texts
from .memory_plan import Ceiling
from .workers import check_num_workers, run_in_processes

ONE_PROCESS_BYTES = 12 << 20
"""Below this many bytes of text one process is done before others have started."""
SMALLEST_SHARD, LARGEST_SHARD = 4 << 20, 32 << 20
SHARDS = 16
"""A file is counted, and kept in the cache, in about 16 shards of 4 to 32 MiB: whoever counts, they are the same."""


def pretoken_counter(
    input_path: InputPath,
    special_tokens: Sequence[str] = (),
    *,
    pattern: str = GPT2_PATTERN,
    num_workers: int | None = None,
    cache_dir: StrPath | None = None,
    max_ram: int | str | None = None,
    progress: bool | None = None,
) -> dict[bytes, int]:
    """The contract's counts, from `num_workers` processes (None: one per processor; small inputs stay in this one).

    cache_dir: a folder for counts that a later or a resumed run takes over; None keeps nothing. max_ram: bytes, or a
    string such as "2GB", for all processes together: tables that outgrow it go to disk; MemoryError where the counts
    themselves would not fit, before counting where a sample shows it. progress: True reports on stderr.
    """
    paths, special_tokens = check(input_path, special_tokens, pattern)
    workers, states = check_num_workers(num_workers), file_states(paths)
    cache = open_cache(cache_dir, paths, special_tokens, pattern)
    ceiling = Ceiling(bytes_of(max_ram), merging=False, progress=bool(progress))
    return count_words(paths, special_tokens, pattern, workers, cache, ceiling, states).to_dict()


def open_cache(
    cache_dir: StrPath | None, paths: Sequence[Path], special_tokens: Sequence[str], pattern: str
) -> TrainingCache | None:
    identity = None if cache_dir is None else identify(paths, special_tokens, pattern)
    return None if cache_dir is None or identity is None else TrainingCache(cache_dir, paths, identity)


def count_words(
    paths: Sequence[Path],
    special_tokens: Sequence[str],
    pattern: str,
    num_workers: int,
    cache: TrainingCache | None,
    ceiling: Ceiling,
    states: FileStates,
) -> WordCounts:
    """Sorted counts of all files: from the cache, or shard by shard, each kept as soon as it is counted.

    Raises ValueError for a file that is no longer in the state it had in `states`; nothing is kept of it.
    """
    if cache is None or (words := cache.load_word_counts()) is None:
        words = _counted(paths, special_tokens, pattern, num_workers, cache, ceiling, states)
        if cache is not None:
            cache.save_word_counts(words)
    ceiling.check(words)
    return words


def _counted(
    paths: Sequence[Path],
    special_tokens: Sequence[str],
    pattern: str,
    num_workers: int,
    cache: TrainingCache | None,
    ceiling: Ceiling,
    states: FileStates,
) -> WordCounts:
    jobs = [
        (number, path, start, end)
        for number, path in enumerate(paths)
        if is_plain(path)
        for start, end in byte_ranges(path, pattern, special_tokens, _shard_bytes(path))
    ]
    other = [path for path in paths if not is_plain(path)]
    total_bytes = sum(end - start for _, _, start, end in jobs)
    ceiling.check_ahead(paths, special_tokens, pattern)
    plan = ceiling.plan(1 if total_bytes <= ONE_PROCESS_BYTES else num_workers)
    with (
        Accumulator(plan.table_bytes, ceiling.report) as accumulator,
        Progress("counting", total_bytes, "bytes", enabled=ceiling.progress) as report,
    ):
        missing, done = [], 0
        for job in jobs:
            kept = cache.load_shard(cache.identity.shard(job[0], *job[2:])) if cache is not None else None
            if kept is None:
                missing.append(job)
            else:
                accumulator.add(kept)
                done += job[3] - job[2]
        report.resume(done)
        calls = [(path, start, end, pattern, special_tokens, plan.most_words) for _, path, start, end in missing]
        for position, words in run_in_processes("cs336_heap_bpe.counting:count_range", calls, plan.num_workers):
            number, path, start, end = missing[position]
            refuse_changed(states, [path])
            # A single shard is the whole: the total is kept right after it.
            if cache is not None and len(jobs) > 1:
                cache.save_shard(cache.identity.shard(number, start, end), words)
            accumulator.add(words)
            done += end - start
            report.update(done)
        if other:
            # One process reads what is not plain: these files can't be entered in the middle.
            for words in count_texts(map(decoded, byte_texts(other)), pattern, special_tokens, plan.most_words):
                accumulator.add(words)
        refuse_changed(states, paths)
        return accumulator.total()


def _shard_bytes(path: Path) -> int:
    return min(LARGEST_SHARD, max(SMALLEST_SHARD, path.stat().st_size // SHARDS))
