"""The byte-pair tokenizer: split on special tokens, cut into pretokens, merge the bytes of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from cs336_registry.components.tokenizer import check, missing_byte, special_ids, text_ids, unknown_id
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import utf8
from cs336_registry.text.patterns import GPT2_PATTERN, pretoken_finder
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import special_token_pattern
from cs336_registry.text.vocab_files import read_merges, read_vocab

from .bpe_trainer import merged


class Tokenizer:
    """See the contract; no pretoken is remembered."""

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = GPT2_PATTERN,
    ) -> None:
        self.vocab, self.merges, self.special_tokens = check(vocab, merges, special_tokens, pattern)
        self.pattern = pattern
        self._id_of = text_ids(self.vocab)
        self._special_id_of = special_ids(self.vocab, self.special_tokens)
        self._special = special_token_pattern(self.special_tokens)
        self._rank_of = {merge: rank for rank, merge in enumerate(self.merges)}
        self._find_pretokens = pretoken_finder(pattern)

    @classmethod
    def from_files(
        cls, vocab_filepath: StrPath, merges_filepath: StrPath, special_tokens: Sequence[str] | None = None
    ) -> Tokenizer:
        return cls(read_vocab(vocab_filepath, special_tokens or ()), read_merges(merges_filepath), special_tokens)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in [text] if self._special is None else self._special.split(text):
            if part in self._special_id_of:
                ids.append(self._special_id_of[part])
            else:
                for pretoken in self._find_pretokens(part):
                    ids.extend(self._encode_pretoken(utf8(pretoken)))
        return ids

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        for chunk in safe_chunks(iterable, self.pattern, self.special_tokens):
            yield from self.encode(chunk)

    def decode(self, ids: Iterable[int]) -> str:
        tokens = []
        for token_id in ids:
            if token_id not in self.vocab:
                raise unknown_id(token_id)
            tokens.append(self.vocab[token_id])
        return b"".join(tokens).decode("utf-8", "replace")

    def _encode_pretoken(self, pretoken: bytes) -> list[int]:
        tokens = [bytes((byte,)) for byte in pretoken]
        for token in tokens:
            if token not in self._id_of:
                raise missing_byte(token)
        while mergeable := [pair for pair in pairwise(tokens) if pair in self._rank_of]:
            tokens = merged(tokens, min(mergeable, key=self._rank_of.__getitem__))
        return [self._id_of[token] for token in tokens]
