"""`cs336 counts build`, `cs336 counts merge`: counting a corpus on several machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

Duplicates = Literal["refuse", "skip"]


def build(
    *shards: str,
    out: Path,
    special_token: Annotated[Sequence[str], Parameter(negative=(), show_default=False)] = (),
    pattern: str = "gpt2",
    part: str | None = None,
    backend: str | None = None,
    num_workers: int | None = None,
    max_ram: str | None = None,
    cache_dir: Path | None = None,
    duplicates: Duplicates = "refuse",
    quiet: bool = False,
) -> int:
    """Count the pretokens of text files, for merging and for cs336 tokenizer train --from-counts.

    Example, on each of eight machines: `cs336 counts build corpus.txt --part 3/8 --special-token '<|endoftext|>' --out
    counts_3.bin`. The file says which bytes of which contents it counted, so nothing is ever counted twice.

    Parameters
    ----------
    shards
        Text files: plain, .gz, .zst, .jsonl or .parquet; folders; globs in quotes.
    out
        The file of counts to write.
    special_token
        A token that text is split on, such as '<|endoftext|>'; may be given several times.
    pattern
        gpt2, cl100k, or a regular expression of the regex package.
    part
        I/N: only the I-th of N parts of the text, cut where no pretoken is; packed files are dealt out whole.
    backend
        A selector such as heap_bpe or ray; the fastest one that runs here by default.
    num_workers
        Processes or threads; one per processor by default.
    max_ram
        A ceiling such as 2GB: tables that outgrow it go to disk.
    cache_dir
        A folder where the counts of whole files are kept for a later run.
    duplicates
        What to do about files of the same content: refuse, or skip all but the first.
    quiet
        Print nothing.
    """
    from ..text import counts_file
    from ..text.accumulator import Accumulator
    from ..text.inputs import expand, refuse_inputs
    from ..text.memory import bytes_of, refuse_beyond
    from ..text.patterns import pattern_from
    from ..text.shards import count_range, file_ranges, identities
    from ..text.special_tokens import check_special_tokens
    from ..text.training_cache import WordCounts
    from .text_backends import check_workers, choose, disk_full, distinct, fitting

    expression, tokens = pattern_from(pattern), check_special_tokens(special_token)
    position, parts = _part(part)
    check_workers(num_workers)
    paths = expand(list(shards))
    if out.is_dir():
        raise ValueError(f"--out is {out}, which is a folder: name a file")
    refuse_inputs(out, paths)
    say = _silent if quiet else _say
    whole = file_ranges(paths, expression, tokens)
    kept = distinct(paths, duplicates, [(one.size, one.digest) for one in identities(whole)])
    ranges = file_ranges(kept, expression, tokens)
    if parts > 1:
        ranges = _dealt(kept, expression, tokens, position, parts)
    known = identities(ranges)
    counter, decision = choose("pretoken_counter", backend)
    options: dict[str, Any] = fitting(
        counter, decision.backend, {"num_workers": num_workers, "max_ram": max_ram, "cache_dir": cache_dir}
    )
    options |= {} if quiet else _progress(counter)
    size = sum(one.end - one.start for one in ranges)
    plural = "s" if len(ranges) != 1 else ""
    say(f"counting {size / 1e6:,.1f} MB in {len(ranges)} shard{plural} with {decision.backend} ...")
    if all(one.is_whole for one in ranges):
        files = [one.path for one in ranges]
        words = WordCounts.of(counter(files, tokens, pattern=expression, **options) if files else {})
    else:
        options.pop("cache_dir", None)
        ceiling = bytes_of(max_ram)
        # Half of it for the sums: what one range needs comes on top of them.
        with Accumulator(None if ceiling is None else ceiling // 2, say) as total:
            for one in ranges:
                total.add(count_range(counter, one, tokens, expression, **options))
            words = total.total()
        # They are held as they are and as they are written, each with 12 bytes of numbers.
        number = len(words.counts)
        refuse_beyond(ceiling, 2 * (len(words.text) + 12 * number), f"a table of {number:,} unique pretokens")
    if identities(ranges) != known:
        raise ValueError("a shard changed while it was counted: count again when it is complete")
    with disk_full(out):
        counts_file.write(out, counts_file.CountsIdentity(expression, tokens, tuple(known)), words)
    say(f"wrote {out}: {len(words.counts):,} pretokens, {int(words.counts.sum()):,} in all")
    return 0


def merge(*files: Path, out: Path, duplicates: Duplicates = "refuse", quiet: bool = False) -> int:
    """Add up files of counts into one, in bounded memory.

    Example: `cs336 counts merge counts_*.bin --out counts.bin`. The result may be merged further.

    Parameters
    ----------
    files
        Files that cs336 counts build or merge wrote, with the same pattern and special tokens.
    out
        The file of counts to write.
    duplicates
        What to do about a file whose shards were all counted by another one: refuse it, or skip it.
    quiet
        Print nothing.
    """
    from ..text import counts_file
    from ..text.progress import Progress
    from .text_backends import disk_full

    opened = [counts_file.CountsFile(path) for path in files]
    total = sum(file.entries for file in opened)
    with disk_full(out), Progress("merging", total, "records", enabled=not quiet) as progress:
        identity, entries = counts_file.merge(opened, out, duplicates=duplicates, report=progress.update)
    (_silent if quiet else _say)(f"wrote {out}: {entries:,} pretokens, shards: {len(identity.shards)}")
    return 0


def _part(part: str | None) -> tuple[int, int]:
    """(position from 0, number of parts) of "3/8"."""
    if part is None:
        return 0, 1
    first, _, last = part.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--part is {part!r}: give the part and the number of parts, such as 3/8")
    return int(first) - 1, int(last)


def _dealt(paths: Sequence[Path], expression: str, tokens: Sequence[str], position: int, parts: int) -> list:
    """The ranges of one part: of each plain file one of `parts` ranges, of the other files every `parts`-th."""
    from ..text.inputs import is_plain
    from ..text.shards import file_ranges

    plain = [path for path in paths if is_plain(path)]
    packed = [path for path in paths if not is_plain(path)]
    ranges = file_ranges(packed[position::parts], expression, tokens)
    for path in plain:
        cut = file_ranges([path], expression, tokens, max(1, -(-path.stat().st_size // parts)))
        ranges += cut[position : position + 1]
    return ranges


def _progress(function: Any) -> dict[str, bool]:
    import inspect

    return {"progress": True} if "progress" in inspect.signature(function).parameters else {}


def _say(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    """Nobody is watching."""
