"""Counting pretokens in several processes, a byte range at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cs336_registry.components.pretoken_counter import check
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import InputPath, byte_texts, decoded, is_plain, utf8
from cs336_registry.text.memory import bytes_of
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.progress import Progress
from cs336_registry.text.training_cache import TrainingCache, WordCounts, identify

from .accumulator import Accumulator
from .counting import count_texts
from .shards import byte_ranges
from .workers import check_num_workers, run_in_processes

ONE_PROCESS_BYTES = 12 << 20
"""Below this many bytes of text one process is done before others have started."""


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
    string such as "2GB": tables that outgrow it go to disk. progress: True reports on stderr.
    """
    paths, special_tokens = check(input_path, special_tokens, pattern)
    workers = check_num_workers(num_workers)
    cache = open_cache(cache_dir, paths, special_tokens, pattern)
    counts = count_words(paths, special_tokens, pattern, workers, cache, bytes_of(max_ram), bool(progress))
    return counts.to_dict()


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
    max_ram: int | None,
    progress: bool,
) -> WordCounts:
    """Sorted counts of all files: from the cache, or shard by shard, each kept as soon as it is counted."""
    if cache is not None and (kept := cache.load_word_counts()) is not None:
        return kept
    jobs = [
        (number, path, start, end)
        for number, path in enumerate(paths)
        if is_plain(path) and path.is_file()
        for start, end in byte_ranges(path, pattern, special_tokens)
    ]
    other = [path for path in paths if not (is_plain(path) and path.is_file())]
    total_bytes = sum(end - start for _, _, start, end in jobs)
    if total_bytes <= ONE_PROCESS_BYTES:
        num_workers = 1
    with Accumulator(max_ram) as accumulator, Progress("counting", total_bytes, "bytes", enabled=progress) as report:
        missing, done = [], 0
        for job in jobs:
            kept = cache.load_shard(cache.identity.shard(job[0], *job[2:])) if cache is not None else None
            if kept is None:
                missing.append(job)
            else:
                accumulator.add(kept.to_dict())
                done += job[3] - job[2]
        report.resume(done)
        calls = [(path, start, end, pattern, special_tokens) for _, path, start, end in missing]
        for position, counts in run_in_processes("cs336_heap_bpe.counting:count_range", calls, num_workers):
            number, _, start, end = missing[position]
            # A single shard is the whole: the total is kept right after it.
            if cache is not None and len(jobs) > 1:
                cache.save_shard(cache.identity.shard(number, start, end), WordCounts.of(counts))
            accumulator.add(counts)
            done += end - start
            report.update(done)
        if other:
            # One process reads what is not plain: these files can't be entered in the middle.
            counts = count_texts(map(decoded, byte_texts(other)), pattern, special_tokens)
            accumulator.add({utf8(pretoken): count for pretoken, count in counts.items()})
        total = accumulator.total()
    if cache is not None:
        cache.save_word_counts(total)
    return total
