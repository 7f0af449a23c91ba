"""GPT-2's file layout: vocab.json (token text → id) and merges.txt (a pair of token texts a line, in order).

Tokens are bytes, JSON holds text: GPT-2 gives every byte a visible character (`Ġ` is the space), and so do these files.
Source: https://github.com/openai/gpt-2/blob/master/src/encoder.py, `bytes_to_unicode`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .files import StrPath, write_text

Vocab = dict[int, bytes]
Merges = list[tuple[bytes, bytes]]

MERGES_HEADER = "#version: 0.2"
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_TO_CHARACTER: dict[int, str] = {byte: chr(byte) for byte in _VISIBLE} | {
    byte: chr(256 + position) for position, byte in enumerate(_HIDDEN)
}
"""Visible bytes stand for themselves; the others take the characters from U+0100 on, in order."""
CHARACTER_TO_BYTE: dict[str, int] = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}
BYTES_IN_CHARACTER_ORDER: tuple[int, ...] = (*_VISIBLE, *_HIDDEN)
"""The 256 bytes as Hugging Face's trainer numbers them: sorted by the character that stands for each."""


def token_to_text(token: bytes) -> str:
    """The visible text of a token: b" the" → "Ġthe"."""
    return "".join(map(BYTE_TO_CHARACTER.__getitem__, token))


def text_to_token(text: str) -> bytes:
    """The token of a visible text; raises KeyError for a character that stands for no byte."""
    return bytes(map(CHARACTER_TO_BYTE.__getitem__, text))


def write_vocab(vocab: Mapping[int, bytes], path: StrPath) -> None:
    """Write vocab.json, ordered by id; raises ValueError where two ids have the same bytes: a key can name one."""
    by_text: dict[str, int] = {}
    for token_id in sorted(vocab):
        text = token_to_text(vocab[token_id])
        if text in by_text:
            raise ValueError(
                f"vocab ids {by_text[text]} and {token_id} are both {vocab[token_id]!r}, and vocab.json can keep "
                f"one of them: use special tokens that are not single bytes"
            )
        by_text[text] = token_id
    write_text(path, json.dumps(by_text, ensure_ascii=False, indent=0) + "\n")


def write_merges(merges: Iterable[Sequence[bytes]], path: StrPath) -> None:
    """Write merges.txt, one merge a line in the order of training."""
    lines = [MERGES_HEADER, *(f"{token_to_text(left)} {token_to_text(right)}" for left, right in merges)]
    write_text(path, "\n".join(lines) + "\n")


def read_vocab(path: StrPath, special_tokens: Iterable[str] = ()) -> Vocab:
    """Read vocab.json. A key that is in `special_tokens`, or that no bytes could have given, is taken as plain text."""
    plain = set(special_tokens)
    try:
        content = json.loads(_read_text(path, "vocab.json"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON ({error}): expected GPT-2's vocab.json, an object of token text to id"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}: expected an object of token text to id")
    vocab: Vocab = {}
    for text, token_id in content.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ValueError(f"{path}: the id of {text!r} is {token_id!r}: ids are whole numbers from 0 on")
        if token_id in vocab:
            raise ValueError(f"{path}: id {token_id} is given to {text!r} and to another token: ids must differ")
        is_plain = text in plain or any(character not in CHARACTER_TO_BYTE for character in text)
        vocab[token_id] = text.encode() if is_plain else text_to_token(text)
    return dict(sorted(vocab.items()))


def read_merges(path: StrPath) -> Merges:
    """Read merges.txt; the `#version` line and empty lines are skipped."""
    merges: Merges = []
    # splitlines() would also cut at U+0085 and others, which are ordinary characters of the layout.
    for number, line in enumerate(_read_text(path, "merges.txt").split("\n"), start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ValueError(f"{path}, line {number} is {line!r}: expected two tokens with one space between them")
        try:
            merges.append((text_to_token(parts[0]), text_to_token(parts[1])))
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: {error.args[0]!r} stands for no byte in GPT-2's layout") from None
    return merges


def _read_text(path: StrPath, kind: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: pass the path of a {kind} in GPT-2's layout")
    try:
        return Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start}): expected GPT-2's {kind}"
        ) from None
