"""Other libraries' tokenizer files. Every module here has `write`, `read` and `encoder`, which is that library's own.

What is written is read back by the library and must give the same ids on text made to show differences; only then does
the file appear. What is read is held against the library, too, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import samples
from ..files import StrPath, sync_folder, write_bytes
from ..tokenizer_folder import StoredTokenizer
from ..vocab_files import Merges, Vocab

FORMATS = {"hf": "hugging_face", "tiktoken": "tiktoken_ranks", "gpt2": "gpt2_files"}
"""Name on the command line -> module."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Foreign:
    """A tokenizer as another library's files have it. `pattern` is the expression."""

    vocab: Vocab
    merges: Merges
    special_tokens: tuple[str, ...]
    pattern: str


def module(name: str) -> ModuleType:
    """The module of a format."""
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}: choose one of {', '.join(FORMATS)}")
    return import_module(f".{FORMATS[name]}", __name__)


def needs(package: str, task: str) -> Any:
    """The library, or the error that says how to get it."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{task} needs the package {package}: pip install 'cs336-registry[export]'", name=package
        )
    return import_module(package)


def export(name: str, stored: StoredTokenizer, encode: Encode, path: StrPath, texts: Sequence[str]) -> list[Path]:
    """Write `stored` in format `name` as or into `path`, held against the library on `texts`; returns the files.

    encode: the tokenizer's own. Raises ValueError where the format can't hold it, or the library gives other ids.
    """
    import tempfile

    chosen = module(name)
    needs(chosen.LIBRARY, f"exporting to {name}")
    with tempfile.TemporaryDirectory(prefix="cs336-export-") as folder:
        trial = Path(folder) / Path(path).name
        files = chosen.write(stored, trial)
        compare(encode, chosen.encoder(trial, stored), texts, f"{chosen.LIBRARY} reads the {name} export otherwise")
        contents = [(Path(path).parent / file.relative_to(folder), file.read_bytes()) for file in files]
    for target, content in contents:
        write_bytes(target, content)
    sync_folder(Path(path).parent)
    return [target for target, _ in contents]


def compare(ours: Encode, theirs: Encode, texts: Sequence[str], complaint: str) -> None:
    """Raise ValueError at the first text that gets other ids, cut down to a short piece that still does."""
    for text in texts:
        if ours(text) == theirs(text):
            continue
        piece = _shortened(text, lambda piece: ours(piece) != theirs(piece))
        raise ValueError(f"{complaint}: {piece!r} is {ours(piece)[:12]} here and {theirs(piece)[:12]} there")


def _shortened(text: str, differs: Callable[[str], bool]) -> str:
    """A part of `text` that differs still: halves, quarters and so on are left out as long as it does."""
    step = len(text) // 2
    while step:
        start = 0
        while start < len(text):
            candidate = text[:start] + text[start + step :]
            if candidate and differs(candidate):
                text = candidate
            else:
                start += step
        step //= 2
    return text


def telling_texts(special_tokens: Sequence[str], tokens: Sequence[bytes]) -> Iterator[str]:
    """Texts in which tokenizers differ if they differ at all: borders of special tokens, of character classes, of
    whitespace, every token by itself, and prose."""
    for token in special_tokens:
        yield from (token, token * 2, f"a{token}b", f" {token} ", f"\n{token}\n\n", token[:-1], token[1:])
    for first in special_tokens:
        yield from (first + second for second in special_tokens)
        yield from (f"{first}{piece}{first}" for piece in samples.TRICKY)
    yield from samples.TRICKY
    yield from (f"x{space}{space}y {space}\n{space}z" for space in ("\u00a0", "\u2003", "\u3000", "\t", "\r\n", "\x85"))
    yield from (samples.tricky(400, seed=seed) for seed in range(8))
    yield samples.prose(2000, documents=4)
    yield "".join(token.decode("utf-8", "ignore") for token in tokens)
    yield " ".join(token.decode("utf-8", "replace") for token in tokens)
    # Every character of the plane that most text is in, without surrogates and without what Unicode has not assigned:
    # libraries bring different versions of its tables.
    yield "".join(map(chr, (*range(0x20), *range(0x20, 0x530), *range(0x3041, 0x3097), *range(0x4E00, 0x5000))))
