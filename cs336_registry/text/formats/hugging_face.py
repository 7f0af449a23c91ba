"""Hugging Face's tokenizer.json: https://huggingface.co/docs/tokenizers/api/models#tokenizers.models.BPE."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from ..patterns import GPT2_PATTERN
from ..tokenizer_folder import StoredTokenizer
from ..vocab_files import CHARACTER_TO_BYTE, Merges, Vocab, text_to_token, token_to_text
from . import Encode, Foreign, needs

LIBRARY = "tokenizers"


def write(stored: StoredTokenizer, path: Path) -> list[Path]:
    tokenizers = needs(LIBRARY, "writing tokenizer.json")
    special = {token.encode(): token for token in stored.special_tokens}
    vocab: dict[str, int] = {}
    for token_id, token in stored.vocab.items():
        # Special tokens are looked up by their plain text.
        text = special.get(token) or token_to_text(token)
        if text in vocab:
            raise ValueError(
                f"ids {vocab[text]} and {token_id} are both {text!r} in tokenizer.json, which can keep one"
            )
        vocab[text] = token_id
    merges = [(token_to_text(left), token_to_text(right)) for left, right in stored.merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    pieces = tokenizers.pre_tokenizers
    if stored.pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = pieces.ByteLevel(add_prefix_space=False)
    else:
        split = pieces.Split(tokenizers.Regex(stored.pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pieces.Sequence([split, pieces.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in stored.special_tokens]
    )
    write_text(path, tokenizer.to_str(pretty=True))
    return [path]


def read(path: Path, special_tokens: tuple[str, ...] = (), pattern: str | None = None) -> Foreign:
    """The byte-level byte-pair tokenizer in tokenizer.json; refuses what would encode otherwise here."""
    content = _content(path)
    model = content["model"]
    _refuse_what_differs(path, content, model)
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}
    for entry in content.get("added_tokens") or ():
        if any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise ValueError(
                f"{path}: added token {entry['content']!r} takes the whitespace around it or only whole words, which "
                f"special tokens don't do here: remove its lstrip, rstrip and single_word"
            )
    vocab: Vocab = {}
    for text, token_id in {**model["vocab"], **added}.items():
        plain = text in added or any(character not in CHARACTER_TO_BYTE for character in text)
        vocab[token_id] = text.encode() if plain else text_to_token(text)
    in_order = tuple(sorted(added, key=added.__getitem__))
    missing = [token for token in special_tokens if token not in added]
    vocab |= dict(enumerate((token.encode() for token in missing), start=max(vocab, default=-1) + 1))
    return Foreign(
        dict(sorted(vocab.items())), _merges(path, model), (*in_order, *missing), pattern or _pattern(path, content)
    )


def encoder(path: Path, stored: StoredTokenizer | Foreign) -> Encode:
    """The library's own reading of the file."""
    tokenizer = needs(LIBRARY, "reading tokenizer.json with Hugging Face's library").Tokenizer.from_file(str(path))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: pass the path of a tokenizer.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["model"]["vocab"], content["model"]["merges"]
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer.json: it is not JSON ({error})") from None
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a tokenizer.json of a byte-pair model: it has no model with merges") from None
    if not isinstance(found[0], dict) or not isinstance(found[1], list):
        raise ValueError(f"{path} is not a tokenizer.json of a byte-pair model: export it from the tokenizers library")
    return content


def _refuse_what_differs(path: Path, content: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    wanted = {"type": ("BPE", None), "dropout": (None, 0), "byte_fallback": (False, None)}
    wanted |= {"continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
    for key, allowed in wanted.items():
        if model.get(key) not in allowed:
            raise ValueError(f"{path}: the model has {key} = {model[key]!r}: only plain byte-level BPE can be imported")
    if content.get("normalizer") is not None:
        raise ValueError(f"{path} changes text before it encodes it ({content['normalizer']}): that can't be imported")


def _merges(path: Path, model: Mapping[str, Any]) -> Merges:
    merges: Merges = []
    for number, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        try:
            left, right = map(text_to_token, pair)
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"{path}: merge {number} is {merge!r}: expected two byte-level tokens") from None
        merges.append((left, right))
    return merges


def _pattern(path: Path, content: Mapping[str, Any]) -> str:
    """The expression that cuts text into pretokens."""
    outer = content.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", []) if outer.get("type") == "Sequence" else [outer]
    kinds = [step.get("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space", True):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return GPT2_PATTERN
        if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and not steps[0].get("invert"):
            expression = steps[0].get("pattern", {}).get("Regex")
            if expression and steps[0].get("behavior", "").lower() == "isolated":
                return expression
    raise ValueError(
        f"{path} cuts text by {' and '.join(map(str, kinds))}: only byte-level cutting by one pattern, without a space "
        f"put in front, can be imported"
    )
