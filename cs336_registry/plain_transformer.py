"""The oracle of the composite components: the same modules from PyTorch's own layers and the ops' oracles.

Nothing here goes through a backend or through `nn.py`; only the names in the state dict are the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .components.attention import oracle as attention
from .components.rope import oracle as rope
from .components.rope import rotation_tables


class PlainAttention(nn.Module):
    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        max_seq_len: int | None = None,
        rope_theta: float | None = None,
        num_kv_heads: int | None = None,
        **placement: Any,
    ) -> None:
        super().__init__()
        self.d_head, self.max_seq_len, self.rope_theta = d_model // num_heads, max_seq_len, rope_theta
        d_kv = d_model if num_kv_heads is None else num_kv_heads * self.d_head
        self.q_proj = nn.Linear(d_model, d_model, bias=False, **placement)
        self.k_proj = nn.Linear(d_model, d_kv, bias=False, **placement)
        self.v_proj = nn.Linear(d_model, d_kv, bias=False, **placement)
        self.output_proj = nn.Linear(d_model, d_model, bias=False, **placement)

    def forward(self, x: Tensor, token_positions: Tensor | None = None) -> Tensor:
        *leading, seq, d_model = x.shape
        x = x.reshape(-1, seq, d_model)
        q, k, v = (
            projection(x).reshape(*x.shape[:2], -1, self.d_head).movedim(2, 1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope_theta is not None:
            tables = rotation_tables(self.d_head, self.max_seq_len or seq, self.rope_theta, x.device)
            if token_positions is not None:
                token_positions = token_positions.broadcast_to(*leading, seq).reshape(-1, seq)
            q, k = (rope(heads, None, *tables, token_positions)[0] for heads in (q, k))
        attended = attention(q, k, v, is_causal=True).movedim(1, 2)
        return self.output_proj(attended.reshape(*leading, seq, d_model))


class PlainFeedForward(nn.Module):
    def __init__(self, d_model: int, d_ff: int, ffn: str, **placement: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff, bias=False, **placement)
        self.w2 = nn.Linear(d_ff, d_model, bias=False, **placement)
        if ffn == "swiglu":
            self.w3 = nn.Linear(d_model, d_ff, bias=False, **placement)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.w1(x))
        return self.w2(hidden * self.w3(x) if hasattr(self, "w3") else hidden)


class PlainBlock(nn.Module):
    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        norm: str = "rms",
        ffn: str = "swiglu",
        norm_eps: float = 1e-5,
        max_seq_len: int | None = None,
        rope_theta: float | None = None,
        num_kv_heads: int | None = None,
        **placement: Any,
    ) -> None:
        super().__init__()
        self.norm = norm
        options = {"max_seq_len": max_seq_len, "rope_theta": rope_theta, "num_kv_heads": num_kv_heads}
        self.attn = PlainAttention(d_model, num_heads, **options, **placement)
        self.ffn = PlainFeedForward(d_model, d_ff, ffn, **placement)
        if norm != "none":
            self.ln1 = nn.RMSNorm(d_model, norm_eps, **placement)
            self.ln2 = nn.RMSNorm(d_model, norm_eps, **placement)

    def forward(self, x: Tensor, token_positions: Tensor | None = None) -> Tensor:
        if self.norm == "post":
            x = self.ln1(x + self.attn(x, token_positions))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(self.ln1(x) if self.norm == "rms" else x, token_positions)
        return x + self.ffn(self.ln2(x) if self.norm == "rms" else x)


class PlainLM(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        rope_theta: float | None = 10000.0,
        *,
        norm: str = "rms",
        position: str = "rope",
        tie_embeddings: bool = False,
        norm_eps: float = 1e-5,
        ffn: str = "swiglu",
        num_kv_heads: int | None = None,
        **placement: Any,
    ) -> None:
        super().__init__()
        theta = rope_theta if position == "rope" else None
        options = {"norm": norm, "norm_eps": norm_eps, "ffn": ffn, "num_kv_heads": num_kv_heads}
        options |= {"max_seq_len": context_length, "rope_theta": theta}
        self.token_embeddings = nn.Embedding(vocab_size, d_model, **placement)
        blocks = [PlainBlock(d_model, num_heads, d_ff, **options, **placement) for _ in range(num_layers)]
        self.layers = nn.ModuleList(blocks)
        self.ln_final = nn.Identity() if norm == "none" else nn.RMSNorm(d_model, norm_eps, **placement)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False, **placement)
        if tie_embeddings:
            self.lm_head.weight = self.token_embeddings.weight

    def forward(self, token_ids: Tensor, token_positions: Tensor | None = None) -> Tensor:
        x = self.token_embeddings(token_ids)
        for layer in self.layers:
            x = layer(x, token_positions)
        return self.lm_head(self.ln_final(x))


def run_with_weights(module: nn.Module, weights: dict[str, Tensor], *inputs: Any) -> Tensor:
    """The module's result with `weights` in place of its own, so that gradients reach them; their names must fit."""
    names = list(module.state_dict())
    assert sorted(names) == sorted(weights), f"the state dict holds {sorted(names)}, expected {sorted(weights)}"
    return torch.func.functional_call(module, weights, inputs)
