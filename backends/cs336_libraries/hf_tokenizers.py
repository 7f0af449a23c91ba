"""Hugging Face tokenizers: byte-level BPE in Rust. Its trainer breaks ties otherwise and counts in 32 bits: not
claimed.
"""

from __future__ import annotations

from cs336_registry.plugin import Backend, hookimpl
from cs336_registry.text.vocab_files import token_to_text

from .peer_tokenizer import PeerTokenizer, peer_backend


@hookimpl
def cs336_backend() -> Backend:
    return peer_backend(
        "hf_tokenizers",
        __name__,
        "tokenizers",
        "Hugging Face tokenizers (Rust)",
        "export",
        ("any_pattern", "partial_bytes"),
    )


class Tokenizer(PeerTokenizer):
    """The library is given the vocabulary in its own letters, one for each byte."""

    def _prepare(self) -> None:
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        letters = {token_to_text(token): token_id for token, token_id in self._id_of.items()}
        merges = [(token_to_text(left), token_to_text(right)) for left, right in self.merges]
        self._library = Library(models.BPE(vocab=letters, merges=merges))
        self._library.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self.pattern), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    def _encode_plain(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids
