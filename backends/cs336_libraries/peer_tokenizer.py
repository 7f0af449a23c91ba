"""What the adapters of tokenizer libraries share: the contract around one function that encodes text without special
tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self

from cs336_registry.components.tokenizer import check, missing_byte, special_ids, text_ids, unknown_id
from cs336_registry.plugin import Backend, Implementation
from cs336_registry.text.files import StrPath
from cs336_registry.text.inputs import utf8
from cs336_registry.text.patterns import GPT2_PATTERN
from cs336_registry.text.pretokens import safe_chunks
from cs336_registry.text.special_tokens import special_token_pattern
from cs336_registry.text.vocab_files import read_merges, read_vocab


class PeerTokenizer:
    """Special tokens, streaming and decoding as the contract says; the library encodes what lies between."""

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
        self._missing = {bytes((byte,)) for byte in range(256)} - set(self._id_of)
        self._prepare()

    def _prepare(self) -> None:
        """Build the library's own object."""
        raise NotImplementedError

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of `text`, which holds no special token and no lone surrogate."""
        raise NotImplementedError

    @classmethod
    def from_files(
        cls, vocab_filepath: StrPath, merges_filepath: StrPath, special_tokens: Sequence[str] | None = None
    ) -> Self:
        return cls(read_vocab(vocab_filepath, special_tokens or ()), read_merges(merges_filepath), special_tokens)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in [text] if self._special is None else self._special.split(text):
            if part in self._special_id_of:
                ids.append(self._special_id_of[part])
            elif part:
                encoded = utf8(part)
                for byte in self._missing:
                    if byte in encoded:
                        raise missing_byte(byte)
                ids.extend(self._encode_plain(encoded.decode()))
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


def peer_backend(name: str, module: str, package: str, summary: str, extra: str, features: tuple[str, ...]) -> Backend:
    """The manifest of a backend that is one library's tokenizer."""
    claim = Implementation(
        component="tokenizer",
        target=f"{module}:Tokenizer",
        deterministic=True,
        thread_safe=True,
        process_safe=True,
        features=features,
    )
    cure = f"pip install 'cs336-registry[{extra}]'"
    return Backend(name=name, summary=summary, requires=(package,), cure=cure, implementations=(claim,))
