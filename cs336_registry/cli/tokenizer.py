"""`cs336 tokenizer train`, `encode`, `decode`, `inspect`, `export` and `import`."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

if TYPE_CHECKING:
    from ..text.tokenizer_folder import StoredTokenizer
    from ..text.training_cache import WordCounts

Several = Annotated[Sequence[str], Parameter(negative=(), show_default=False)]
Format = Literal["hf", "tiktoken", "gpt2"]
GIGABYTES = 825
"""The size of The Pile, which the course asks the encoding time of."""


def train(
    *inputs: str,
    out: Path,
    vocab_size: int,
    special_token: Several = (),
    pattern: str | None = None,
    tie_break: Literal["greatest_bytes", "smallest_ids"] = "greatest_bytes",
    from_counts: Path | None = None,
    backend: str | None = None,
    num_workers: int | None = None,
    max_ram: str | None = None,
    checkpoint_every: int | None = None,
    cache_dir: Path | None = None,
    resume: bool = True,
    quiet: bool = False,
) -> int:
    """Learn a byte-pair vocabulary from text, or from counts.

    Interrupted, even by kill -9, the same command continues. Examples: `cs336 tokenizer train corpus.txt --vocab-size
    10000 --special-token '<|endoftext|>' --out tokenizer`, `cs336 tokenizer train --from-counts counts.bin --vocab-size
    32000 --out tokenizer`.

    Parameters
    ----------
    inputs
        Text files: plain, .gz, .zst, .jsonl or .parquet; folders; globs in quotes; - for standard input.
    out
        The folder of the tokenizer: vocab.json, merges.txt and metadata.json, and for numba_bpe the corpus's most
        frequent pretokens, which make encoding fast from the start.
    vocab_size
        Tokens altogether: special tokens, the 256 bytes, and merges.
    special_token
        A token that text is split on, such as '<|endoftext|>'; may be given several times. With --from-counts: the
        same ones, and by default those, in the order of their ids.
    pattern
        gpt2 (the default), cl100k, or a regular expression of the regex package.
    tie_break
        Which of the most frequent pairs goes first; smallest_ids is what Hugging Face's trainer does.
    from_counts
        A file of cs336 counts build or merge, in place of text.
    backend
        A selector such as heap_bpe; the fastest one that runs here by default.
    num_workers
        Processes or threads; one per processor by default.
    max_ram
        A ceiling such as 2GB: counts that outgrow it go to disk.
    checkpoint_every
        Merges between two checkpoints; 300 by default.
    cache_dir
        Where counts and checkpoints are kept; data/cache by default.
    resume
        Go on from what is kept of this corpus; --no-resume throws that away first.
    quiet
        Print nothing.
    """
    import time

    from ..text import tokenizer_folder
    from ..text.patterns import pattern_name
    from ..text.progress import duration
    from .text_backends import check_workers, choose, disk_full

    if bool(inputs) == (from_counts is not None):
        raise ValueError("name text files to train on, or --from-counts FILE, and not both")
    if from_counts is not None and pattern is not None:
        raise ValueError(f"--pattern {pattern} goes with text: the counts were made with a pattern already")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every is {checkpoint_every}: it must be at least 1 merge")
    check_workers(num_workers)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out is {out}, which is a file: name a folder for the tokenizer")
    say = _silent if quiet else _say
    function, decision = choose("bpe_trainer", backend)
    source = (
        _Counts(from_counts, special_token)
        if from_counts is not None
        else _Text(inputs, special_token, pattern or "gpt2")
    )
    request = {
        "vocab_size": vocab_size,
        "pattern": pattern_name(source.pattern),
        "tie_break": tie_break,
        "special_tokens": list(source.special_tokens),
        "corpus": source.corpus,
    }
    if tokenizer_folder.is_there(out):
        return _already_there(out, request, say)
    options = {
        "num_workers": num_workers, "max_ram": max_ram, "checkpoint_every": checkpoint_every, "cache_dir": cache_dir
    }  # fmt: skip
    say(f"training {vocab_size:,} tokens on {source.describe()} with {decision.backend} ...")
    start = time.monotonic()
    with disk_full(out):
        vocab, merges = source.train(function, decision, vocab_size, tie_break, options, resume, not quiet)
        seconds = time.monotonic() - start
        stored = tokenizer_folder.write(
            out, vocab, merges, **request, seconds=round(seconds, 3), decisions={"bpe_trainer": decision.to_dict()}
        )
        counts = source.counts(cache_dir)
        _keep_frequent_words(stored, counts, out, backend)
    for line in () if quiet else source.warnings(counts):
        say(line)
    short = "" if len(vocab) == vocab_size else f" (no pair is left to merge: fewer than the {vocab_size:,} asked for)"
    say(f"wrote {out}: {len(vocab):,} tokens, {len(merges):,} merges in {duration(seconds)}{short}")
    return 0


def encode(
    *inputs: str,
    tokenizer: Path,
    out: Path,
    backend: str | None = None,
    num_workers: int | None = None,
    quiet: bool = False,
) -> int:
    """Write the token ids of text to a file that can be memory-mapped.

    The .npy file has uint16 ids, or uint32 for more than 65,536 tokens; numpy.load(out, mmap_mode="r") opens it.
    Interrupted, the same command continues. Example: `cs336 tokenizer encode corpus.txt --tokenizer tokenizer --out
    corpus.npy`.

    Parameters
    ----------
    inputs
        Text files: plain, .gz, .zst, .jsonl or .parquet; folders; globs in quotes; - for standard input. Several texts
        get the first special token between them.
    tokenizer
        The tokenizer's folder.
    out
        The .npy file to write; what is known of the ids goes into a .json beside it.
    backend
        A selector such as heap_bpe; the fastest one that runs here by default.
    num_workers
        Processes; one per processor by default.
    quiet
        Print nothing.
    """
    from ..machine import detect
    from ..pipeline import encoding, tokenization
    from ..pipeline.progress import Progress
    from .text_backends import check_workers, disk_full, selector

    if not inputs:
        raise ValueError("no text was given: name text files, or - for standard input")
    if out.suffix != ".npy":
        raise ValueError(f"--out is {out}: the ids go to a .npy file, such as {out.with_suffix('.npy')}")
    check_workers(num_workers)
    chosen = selector("tokenizer", backend)
    progress = Progress(quiet=quiet)
    with disk_full(out):
        found = encoding.encode(
            inputs,
            tokenization.read(tokenizer, chosen),
            out,
            progress,
            workers=num_workers or detect().cpu_count,
            backend=chosen,
        )
    progress.say(f"wrote {out}: {len(found.ids):,} tokens ({found.ids.dtype}), {found.bytes_per_token:.2f} bytes each")
    return 0


def decode(tokens: str, /, *, tokenizer: Path, out: Path | None = None) -> int:
    """Write the text of token ids.

    Example: `cs336 tokenizer decode corpus.npy --tokenizer tokenizer --out corpus.txt`.

    Parameters
    ----------
    tokens
        A .npy file of ids, or - for ids as numbers on standard input.
    tokenizer
        The tokenizer's folder.
    out
        The text file to write; standard output by default.
    """
    from ..pipeline.progress import Progress
    from ..text import tokenizer_folder
    from ..text.files import atomic_write
    from ..text.inputs import refuse_inputs
    from .text_backends import disk_full

    vocab = tokenizer_folder.read(tokenizer).vocab
    if out is None:
        for piece in _decoded(_chunks_of_ids(tokens), vocab):
            sys.stdout.write(piece)
        return 0
    refuse_inputs(out, [Path(tokens)])
    with Progress().stage(f"decoding {tokens}", unit="tokens") as stage, disk_full(out), atomic_write(out) as file:
        for piece in _decoded(_watched(_chunks_of_ids(tokens), stage), vocab):
            file.write(piece.encode())
    return 0


def inspect(
    tokenizer: Path,
    *corpora: str,
    backend: str | None = None,
    sample: str = "20MB",
    longest: int = 10,
    json: bool = False,
) -> int:
    """Show what a tokenizer learnt, how well it packs text, and how fast it is.

    Example: `cs336 tokenizer inspect tokenizer stories.txt web.txt.gz`: the longest tokens, those that never come up,
    damaged ones, bytes per token on each corpus, and the hours that 825 GB (The Pile) would take.

    Parameters
    ----------
    tokenizer
        The tokenizer's folder.
    corpora
        Texts to encode: its own corpus and another one, say.
    backend
        A selector such as heap_bpe; the fastest one that runs here by default.
    sample
        How much of each corpus is encoded, from its beginning.
    longest
        How many of the longest tokens are shown.
    json
        Print plain data instead of tables.
    """
    import cs336_registry as registry

    from ..pipeline.progress import Progress
    from ..text import inspection, tokenizer_folder
    from .text_backends import selector

    stored = tokenizer_folder.read(tokenizer)
    chosen = selector("tokenizer", backend)
    built = tokenizer_folder.build(registry.get("tokenizer", backend=chosen), stored, tokenizer)
    limit = inspection.bytes_of(sample)
    progress = Progress(quiet=json)
    rows = []
    for name in corpora:
        with progress.stage(f"encoding {name}", limit, "B") as stage:
            rows.append(inspection.encoded(built, name, limit, stage.advance))
    used = set().union(*(row.used for row in rows)) if rows else None
    report: dict[str, Any] = {
        "folder": str(tokenizer),
        "fingerprint": stored.fingerprint,
        "pattern": stored.metadata["pattern"],
        "tie_break": stored.metadata.get("tie_break"),
        "special_tokens": list(stored.special_tokens),
        "backend": registry.resolve("tokenizer", backend=chosen).backend,
        **inspection.vocabulary(stored, built, used, longest),
        "corpora": [row.to_dict(GIGABYTES) for row in rows],
    }
    if json:
        print(json_module.dumps(report, ensure_ascii=False, indent=2))
    else:
        _show(report)
    return 0


def export(tokenizer: Path, *, format: Format, out: Path, backend: str | None = None) -> int:
    """Write a tokenizer for other libraries, each result held against that library.

    Example: `cs336 tokenizer export tokenizer --format hf --out tokenizer.json`. The library reads the file back and
    must give the same ids on text made to show differences; only then is it kept.

    Parameters
    ----------
    tokenizer
        The tokenizer's folder.
    format
        hf: tokenizer.json of Hugging Face; tiktoken: a file of ranks, and pattern and special tokens in a .json beside
        it; gpt2: a folder with vocab.json and merges.txt.
    out
        The file or folder to write.
    backend
        A selector such as heap_bpe; the fastest one that runs here by default.
    """
    from ..text import formats, tokenizer_folder
    from .text_backends import disk_full

    stored = tokenizer_folder.read(tokenizer)
    texts = list(formats.telling_texts(stored.special_tokens, list(stored.vocab.values())))
    with disk_full(out):
        files = formats.export(format, stored, _built(stored, backend).encode, out, texts)
    _say(
        f"wrote {', '.join(map(str, files))}: the same ids as {formats.module(format).LIBRARY} on {len(texts):,} texts"
    )
    return 0


def import_(
    source: Path,
    /,
    *,
    format: Format,
    out: Path,
    special_token: Several = (),
    pattern: str | None = None,
    backend: str | None = None,
) -> int:
    """Take over a tokenizer from another library's files.

    Example: `cs336 tokenizer import tokenizer.json --format hf --out tokenizer`. Where that library is installed, both
    must give the same ids on text made to show differences.

    Parameters
    ----------
    source
        hf: tokenizer.json; tiktoken: a file of ranks; gpt2: a folder with vocab.json and merges.txt.
    format
        hf, tiktoken or gpt2.
    out
        The folder of the tokenizer to write.
    special_token
        A special token that the files do not name; may be given several times.
    pattern
        gpt2, cl100k or a regular expression, where the files do not hold it.
    backend
        A selector such as heap_bpe; the fastest one that runs here by default.
    """
    from importlib.util import find_spec

    from ..text import formats, tokenizer_folder
    from ..text.patterns import pattern_from
    from ..text.special_tokens import check_special_tokens
    from .text_backends import disk_full

    if tokenizer_folder.is_there(out):
        raise FileExistsError(f"{out} holds a tokenizer already: choose another --out, or delete it")
    chosen = formats.module(format)
    expression = None if pattern is None else pattern_from(pattern)
    found = chosen.read(source, check_special_tokens(special_token), expression)
    built = _built(found, backend)
    checked = find_spec(chosen.LIBRARY) is not None
    if checked:
        texts = list(formats.telling_texts(found.special_tokens, list(found.vocab.values())))
        formats.compare(
            built.encode, chosen.encoder(source, found), texts, f"{chosen.LIBRARY} reads {source} otherwise"
        )
    with disk_full(out):
        tokenizer_folder.write(
            out,
            found.vocab,
            found.merges,
            pattern=found.pattern,
            special_tokens=found.special_tokens,
            tie_break=None,
            imported_from=format,
        )
    proof = f"the same ids as {chosen.LIBRARY}" if checked else f"not compared: {chosen.LIBRARY} is not installed"
    _say(f"wrote {out}: {len(found.vocab):,} tokens, {len(found.merges):,} merges ({proof})")
    return 0


class _Text:
    """Training on text."""

    def __init__(self, inputs: Sequence[str], special_tokens: Sequence[str], pattern: str) -> None:
        from ..text.inputs import expand
        from ..text.patterns import pattern_from
        from ..text.special_tokens import check_special_tokens
        from ..text.training_cache import identify

        self.pattern, self.special_tokens = pattern_from(pattern), check_special_tokens(special_tokens)
        self.paths = expand(list(inputs))
        self.identity = identify(self.paths, self.special_tokens, self.pattern)

    @property
    def corpus(self) -> str | None:
        return None if self.identity is None else self.identity.digest

    def describe(self) -> str:
        size = sum(path.stat().st_size for path in self.paths if path.is_file())
        return f"{len(self.paths)} file{'s' if len(self.paths) > 1 else ''} ({size / 1e6:,.1f} MB)"

    def train(self, function, decision, vocab_size, tie_break, options, resume, progress):
        from ..text.training_cache import TrainingCache
        from .text_backends import DEFAULT_CACHE, fitting

        taken = fitting(function, decision.backend, options)
        # Standard input can't be known again, so nothing of it is kept.
        if _has(function, "cache_dir") and self.identity is not None:
            taken.setdefault("cache_dir", DEFAULT_CACHE)
            if not resume:
                _forget(TrainingCache(taken["cache_dir"], self.paths, self.identity))
        if _has(function, "progress"):
            taken["progress"] = progress
        return function(
            self.paths, vocab_size, list(self.special_tokens), pattern=self.pattern, tie_break=tie_break, **taken
        )

    def counts(self, cache_dir: Path | None) -> WordCounts | None:
        """What training counted, where it was kept."""
        from ..text.training_cache import TrainingCache
        from .text_backends import DEFAULT_CACHE

        if self.identity is None:
            return None
        return TrainingCache(cache_dir or DEFAULT_CACHE, self.paths, self.identity).load_word_counts()

    def warnings(self, counts: WordCounts | None) -> Iterator[str]:
        """What is wrong with the text. It is read again only where something was replaced, or nothing was kept."""
        from ..text.inputs import REPLACEMENT, malformed_in, malformed_warnings

        if counts is None or REPLACEMENT in counts.text:
            yield from malformed_warnings(malformed_in(path for path in self.paths if path.is_file()))


class _Counts:
    """Training on words that were counted before."""

    def __init__(self, path: Path, special_tokens: Sequence[str]) -> None:
        from ..text.counts_file import CountsFile
        from ..text.special_tokens import check_special_tokens

        self.file = CountsFile(path)
        identity = self.file.identity
        self.pattern = identity.pattern
        self.special_tokens = check_special_tokens(special_tokens) or identity.special_tokens
        if sorted(self.special_tokens) != sorted(identity.special_tokens):
            raise ValueError(
                f"--special-token is {list(self.special_tokens)}, and {path} was counted with "
                f"{list(identity.special_tokens)}: pass the same ones, in any order, or none"
            )

    @property
    def corpus(self) -> str:
        return self.file.identity.corpus.digest

    def describe(self) -> str:
        return f"{self.file.entries:,} counted pretokens"

    def train(self, function, decision, vocab_size, tie_break, options, resume, progress):
        from ..components.bpe_trainer import check_counts
        from ..plugin import load
        from ..text.training_cache import TrainingCache
        from .text_backends import DEFAULT_CACHE, fitting

        if vocab_size < 256 + len(self.special_tokens):
            raise ValueError(
                f"--vocab-size is {vocab_size}: it must be at least {256 + len(self.special_tokens)}, for the 256 "
                f"bytes and {len(self.special_tokens)} special tokens"
            )
        package = decision.target.partition(":")[0].partition(".")[0]
        try:
            from_counts = load(f"{package}.train_from_counts:train_from_counts")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.train_from_counts":
                raise
            raise ValueError(
                f"backend {decision.backend} can't train from counts: pass --backend numba_bpe or heap_bpe"
            ) from None
        check_counts(range(self.file.entries), self.file.path)
        folder = options.pop("cache_dir") or DEFAULT_CACHE
        taken = fitting(from_counts, decision.backend, options)
        if _has(from_counts, "cache"):
            cache = TrainingCache(folder, [self.file.path], self.file.identity.corpus)
            if not resume:
                _forget(cache)
            taken |= {"cache": cache, "progress": progress}
        return from_counts(self.words, vocab_size, list(self.special_tokens), tie_break=tie_break, **taken)

    def counts(self, cache_dir: Path | None) -> WordCounts:
        return self.words

    def warnings(self, counts: WordCounts | None) -> Iterator[str]:
        """Nothing is known of the text itself."""
        return iter(())

    @cached_property
    def words(self) -> WordCounts:
        return self.file.words()


def _keep_frequent_words(stored: StoredTokenizer, counts: WordCounts | None, folder: Path, backend: str | None) -> None:
    """Let the backend that would encode with this tokenizer keep what training counted, if it has a use for it."""
    built = _built(stored, backend)
    if counts is not None and hasattr(built, "keep_frequent_words"):
        built.keep_frequent_words(counts, folder)


def _has(function: Any, parameter: str) -> bool:
    from inspect import signature

    return parameter in signature(function).parameters


def _forget(cache: Any) -> None:
    """Throw away what is kept of one corpus."""
    for path in cache.folder.glob(f"*{cache.identity.digest}*"):
        path.unlink()


def _already_there(out: Path, request: dict[str, Any], say: Any) -> int:
    from ..text import tokenizer_folder

    metadata = tokenizer_folder.read(out).metadata
    for key, wanted in request.items():
        if metadata.get(key) != wanted or wanted is None:
            raise FileExistsError(
                f"{out} holds a tokenizer with {key} = {metadata.get(key)!r}, and {wanted!r} was asked for: choose "
                f"another --out, or delete {out}"
            )
    say(f"{out} holds this tokenizer already: {metadata['tokens']:,} tokens, {metadata['merges']:,} merges")
    return 0


def _built(stored: StoredTokenizer | Any, backend: str | None) -> Any:
    """The tokenizer's object."""
    import cs336_registry as registry

    from .text_backends import selector

    build = registry.get("tokenizer", backend=selector("tokenizer", backend))
    return build(stored.vocab, stored.merges, list(stored.special_tokens), pattern=stored.pattern)


def _chunks_of_ids(tokens: str) -> Iterator[Iterable[int]]:
    """The ids, some at a time."""
    from ..text.inputs import STANDARD_INPUT

    if Path(tokens) == STANDARD_INPUT:
        for line in sys.stdin:
            for word in line.replace(",", " ").replace("[", " ").replace("]", " ").split():
                if not word.isdecimal():
                    raise ValueError(f"{word!r} is no token id: give whole numbers")
                yield (int(word),)
        return
    import numpy as np

    try:
        ids = np.load(tokens, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {tokens}: pass a .npy file of cs336 tokenizer encode") from None
    except ValueError:
        raise ValueError(
            f"{tokens} is not a .npy file of token ids: pass one of cs336 tokenizer encode, or - for numbers on "
            f"standard input"
        ) from None
    if ids.ndim != 1 or ids.dtype.kind not in "ui":
        raise ValueError(f"{tokens} holds {ids.ndim}-D {ids.dtype}: expected one dimension of whole numbers")
    for first in range(0, len(ids), 1 << 16):
        yield ids[first : first + (1 << 16)].tolist()


def _watched(chunks: Iterable[Any], stage: Any) -> Iterator[Any]:
    for chunk in chunks:
        yield chunk
        stage.advance(len(chunk))


def _decoded(chunks: Iterable[Iterable[int]], vocab: dict[int, bytes]) -> Iterator[str]:
    """The text, chunk by chunk: the same as decoding all ids at once."""
    from ..components.tokenizer import unknown_id
    from ..text.inputs import decoded

    def contents() -> Iterator[bytes]:
        for ids in chunks:
            try:
                yield b"".join(map(vocab.__getitem__, ids))
            except KeyError as error:
                raise unknown_id(error.args[0]) from None

    return decoded(contents())


def _show(report: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = f"{report['tokens']:,} tokens, {report['merges']:,} merges, pattern {report['pattern']}"
    console.print(f"{report['folder']}: {facts}, fingerprint {report['fingerprint']}", markup=False, soft_wrap=True)
    console.print(f"longest: {report['longest']}", markup=False, soft_wrap=True)
    for key, meaning in (
        (
            "dead",
            "dead (never used in these corpora)" if report["corpora"] else "dead (their own text never gives them)",
        ),
        ("mojibake", "mojibake (text that was decoded wrongly before)"),
        ("incomplete", "incomplete (not whole characters)"),
    ):
        found = report[key]
        console.print(f"{meaning}: {found['count']:,}, such as {found['examples']}", markup=False, soft_wrap=True)
    if not report["corpora"]:
        return
    table = Table("corpus", "sampled", "bytes per token", "MB/s", f"hours for {GIGABYTES} GB", box=SIMPLE_HEAD)
    for row in report["corpora"]:
        table.add_row(
            row["corpus"],
            f"{row['bytes'] / 1e6:,.1f} MB",
            f"{row['bytes_per_token']:.3f}",
            f"{row['megabytes_per_second']:,.1f}",
            f"{row['hours_for_825_gb']:,.1f}",
        )
    console.print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    """Nobody is watching."""
