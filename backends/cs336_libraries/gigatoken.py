"""gigatoken: byte-level BPE in Rust. Its trainer breaks ties by the smallest pair and trains through some special
tokens, so only the tokenizer is claimed.
"""

from __future__ import annotations

import json

from cs336_registry.plugin import Backend, hookimpl
from cs336_registry.text.vocab_files import token_to_text

from .peer_tokenizer import PeerTokenizer, peer_backend


@hookimpl
def cs336_backend() -> Backend:
    return peer_backend("gigatoken", __name__, "gigatoken", "gigatoken (Rust)", "gigatoken", ())


class Tokenizer(PeerTokenizer):
    """The library reads a tokenizer.json that is written for it in memory."""

    def _prepare(self) -> None:
        import gigatoken

        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        bytes_to_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        description = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_to_letters]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {token_to_text(token): token_id for token, token_id in self._id_of.items()},
                "merges": [[token_to_text(left), token_to_text(right)] for left, right in self.merges],
            },
        }
        self._library = gigatoken.Tokenizer.from_json(json.dumps(description))

    def _encode_plain(self, text: str) -> list[int]:
        return self._library.encode(text).tolist()
