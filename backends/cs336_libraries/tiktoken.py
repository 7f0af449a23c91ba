"""tiktoken: byte-level BPE in Rust, from ranks alone. It joins any neighbours whose bytes are a token, the lowest rank
first.
"""

from __future__ import annotations

from cs336_registry.plugin import Backend, hookimpl

from .peer_tokenizer import PeerTokenizer, peer_backend


@hookimpl
def cs336_backend() -> Backend:
    return peer_backend("tiktoken", __name__, "tiktoken", "tiktoken (Rust)", "export", ("any_pattern", "partial_bytes"))


class Tokenizer(PeerTokenizer):
    """Ranks are the order of the merges; they are translated to the vocabulary's ids afterwards."""

    def _prepare(self) -> None:
        import tiktoken

        tokens = [bytes((byte,)) for byte in range(256)]
        tokens += dict.fromkeys(left + right for left, right in self.merges)
        ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
        # A byte that the vocabulary lacks was refused before; it only keeps its rank.
        self._ids = [self._id_of.get(token, -1) for token in ranks]
        self._library = tiktoken.Encoding(
            "cs336_registry", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def _encode_plain(self, text: str) -> list[int]:
        return [self._ids[rank] for rank in self._library.encode_ordinary(text)]
