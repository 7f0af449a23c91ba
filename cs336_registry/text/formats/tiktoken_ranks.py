"""tiktoken's ranks: a line "base64(token) rank" each, https://github.com/openai/tiktoken/blob/main/tiktoken/load.py.

The file holds neither the pattern nor the special tokens; both go into NAME.json beside it. tiktoken joins whatever
neighbours are a token together, the lowest id first, so the ids of merged tokens must rise with the merges.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from ..files import write_bytes, write_json
from ..patterns import GPT2_PATTERN
from ..special_tokens import check_special_tokens
from ..tokenizer_folder import StoredTokenizer
from ..vocab_files import Merges, Vocab
from . import Encode, Foreign, needs

LIBRARY = "tiktoken"


def write(stored: StoredTokenizer, path: Path) -> list[Path]:
    ambiguous = [(a, b) for a in stored.special_tokens for b in stored.special_tokens if a != b and b.startswith(a)]
    if ambiguous:
        raise ValueError(
            f"special token {ambiguous[0][1]!r} begins with {ambiguous[0][0]!r}, and tiktoken does not say which of "
            f"the two it takes: export to hf, which takes the longer one"
        )
    special_ids = _special_ids(stored)
    lines = [
        base64.b64encode(token) + b" %d" % token_id
        for token_id, token in sorted(stored.vocab.items())
        if token_id not in special_ids.values()
    ]
    write_bytes(path, b"\n".join(lines) + b"\n")
    companion = {"pat_str": stored.pattern, "special_tokens": special_ids}
    write_json(_companion(path), companion, indent=2)
    return [path, _companion(path)]


def read(path: Path, special_tokens: tuple[str, ...] = (), pattern: str | None = None) -> Foreign:
    """The tokenizer of a file of ranks; the companion file, or the arguments, say what the ranks do not.

    Special tokens that no file gives an id take the next ones. The merges are found again from the ranks.
    """
    ranks = _ranks(path)
    special_ids: dict[str, int] = {}
    if _companion(path).is_file():
        try:
            companion = json.loads(_companion(path).read_text(encoding="utf-8"))
            special_ids = {str(token): int(rank) for token, rank in companion["special_tokens"].items()}
            pattern = pattern or str(companion["pat_str"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{_companion(path)} lacks or breaks {error}: expected pat_str and special_tokens"
            ) from None
    elif pattern is None:
        raise ValueError(
            f"{path} holds no pattern and {_companion(path)} is not there: pass --pattern gpt2, cl100k or an expression"
        )
    last = max((*ranks.values(), *special_ids.values()))
    new = [token for token in check_special_tokens(special_tokens) if token not in special_ids]
    special_ids |= {token: last + 1 + number for number, token in enumerate(new)}
    vocab: Vocab = {rank: token for token, rank in ranks.items()} | {
        rank: token.encode() for token, rank in special_ids.items()
    }
    if len(vocab) != len(ranks) + len(special_ids):
        raise ValueError(f"{path}: an id is given to two tokens: ids must differ")
    in_order = tuple(sorted(special_ids, key=special_ids.__getitem__))
    return Foreign(dict(sorted(vocab.items())), recovered_merges(ranks), in_order, pattern or GPT2_PATTERN)


def encoder(path: Path, stored: StoredTokenizer | Foreign) -> Encode:
    """tiktoken's own encoding with the file's ranks."""
    tiktoken = needs(LIBRARY, "reading ranks with tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    # Otherwise tiktoken keeps what it once read under a path, whatever the file holds later.
    with _environment("TIKTOKEN_CACHE_DIR", ""):
        ranks = load_tiktoken_bpe(str(path))
    encoding = tiktoken.Encoding(
        name=path.stem, pat_str=stored.pattern, mergeable_ranks=ranks, special_tokens=_special_ids(stored)
    )
    return lambda text: encoding.encode(text, allowed_special="all")


def recovered_merges(ranks: dict[bytes, int]) -> Merges:
    """The merge that makes each token: what is left of it, as two tokens, when all lower ranks have been joined."""
    merges: Merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            known = [
                (found, place)
                for place, (left, right) in enumerate(pairwise(parts))
                if (found := ranks.get(left + right, rank)) < rank
            ]
            if not known:
                break
            _, place = min(known)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) != 2 or any(part not in ranks for part in parts):
            raise ValueError(
                f"token {rank} ({token!r}) can't be reached by joining two tokens of lower rank: these ranks are no "
                f"byte-pair vocabulary"
            )
        merges.append((parts[0], parts[1]))
    return merges


def _ranks(path: Path) -> dict[bytes, int]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: pass a file of tiktoken ranks")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number} is {line[:60]!r}: expected a base64 token and its rank") from None
    if not ranks:
        raise ValueError(f"{path} is empty: pass a file of tiktoken ranks")
    return ranks


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _special_ids(stored: StoredTokenizer | Foreign) -> dict[str, int]:
    smallest = {stored.vocab[token_id]: token_id for token_id in sorted(stored.vocab, reverse=True)}
    return {token: smallest[token.encode()] for token in stored.special_tokens}


def _companion(path: Path) -> Path:
    return path.with_name(path.name + ".json")
