"""Encoding any text with a tokenizer folder, outside a run.

One plain file is encoded where it lies. Anything else (packed files, .jsonl, .parquet, several files, standard input)
is first written out as one plain text beside the result, with the end-of-text token between its texts, for as long as
the encoding takes. An interrupted one reads the text again and continues with the parts that are missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..text.inputs import (
    REPLACEMENT,
    STANDARD_INPUT,
    MalformedCounter,
    byte_texts,
    decoded,
    expand,
    is_plain,
    malformed_in,
    malformed_warnings,
    refuse_inputs,
)
from . import corpus, tokens
from .progress import Progress
from .stopping import leaving_in_order
from .tokenization import RunTokenizer

if TYPE_CHECKING:
    import numpy as np

LOOKED_THROUGH = 1 << 20
"""Ids that are compared at once."""


def encode(
    inputs: Sequence[str],
    tokenizer: RunTokenizer,
    out: Path,
    progress: Progress,
    *,
    workers: int = 1,
    backend: str | None = None,
) -> tokens.Tokens:
    """The ids of all texts of `inputs`, in `out` (.npy, uint16 or uint32); what is known of them is in a .json beside.

    Raises ValueError where several texts need an end-of-text token and the tokenizer has none, or an input stands where
    the result goes, and MismatchError where `out` holds other ids.
    """
    paths = expand(list(inputs))
    # One name for all runs, so that what a killed one left is written over.
    copy = out.absolute().with_name(f".{out.stem}.text.tmp")
    refuse_inputs(out, paths, beside=(out.with_suffix(".json"), copy))
    is_one = len(paths) == 1 and is_plain(paths[0])
    malformed: defaultdict[Path, MalformedCounter] = defaultdict(MalformedCounter)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with leaving_in_order():
        try:
            if not is_one:
                _write_out(paths, tokenizer.end_of_text, copy, progress, malformed)
            split = corpus.measure(paths[0] if is_one else copy, tokenizer.end_of_text, progress, _named(paths))
            found = tokens.prepare(split, tokenizer, out, progress, workers=workers, backend=backend)
        finally:
            copy.unlink(missing_ok=True)
    if is_one:
        tell_malformed(paths[0], found, tokenizer, progress)
    for line in malformed_warnings(malformed):
        progress.say(line)
    return found


def tell_malformed(path: Path, found: tokens.Tokens, tokenizer: RunTokenizer, progress: Progress) -> None:
    """Say how many malformed sequences of bytes the plain file has whose tokens were found."""
    if not progress.quiet and _may_have_replacements(found.ids, tokenizer.tokenizer.vocab):
        for line in malformed_warnings(malformed_in([path])):
            progress.say(line)


def _named(paths: Sequence[Path]) -> str:
    """What messages call the inputs, whatever file their text is copied to."""
    first = "standard input" if paths[0] == STANDARD_INPUT else str(paths[0])
    return first if len(paths) == 1 else f"{first} and {len(paths) - 1:,} more"


def _write_out(
    paths: Sequence[Path],
    separator: str,
    copy: Path,
    progress: Progress,
    malformed: Mapping[Path, MalformedCounter],
) -> None:
    """The texts as one plain file."""
    with progress.stage("reading the text", unit="B") as stage, open(copy, "wb") as file:
        watched = byte_texts(paths, watch=lambda path, block: malformed[path](block))
        for number, blocks in enumerate(watched):
            if number and not separator:
                raise ValueError(
                    "the tokenizer has no special token to put between several texts: encode them one at a time"
                )
            file.write(separator.encode() if number else b"")
            for block in _clean(blocks):
                file.write(block)
                stage.advance(len(block))


def _clean(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks as sound UTF-8: malformed bytes at a text's end must not join with what follows."""
    return (text.encode() for text in decoded(blocks) if text)


def _may_have_replacements(ids: np.ndarray, vocab: Mapping[int, bytes]) -> bool:
    """Whether U+FFFD can be in the text of `ids`, its own or in place of malformed bytes: some token holds it, or ends
    as it begins. Quicker than looking at the text, and few texts have one of these tokens."""
    begins = (REPLACEMENT[:1], REPLACEMENT[:2])
    wanted = [number for number, token in vocab.items() if REPLACEMENT in token or token.endswith(begins)]
    chunks = (ids[start : start + LOOKED_THROUGH] for start in range(0, len(ids), LOOKED_THROUGH))
    return any((chunk == number).any() for chunk in chunks for number in wanted)
