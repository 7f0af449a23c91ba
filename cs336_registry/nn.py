"""The parts of a Transformer language model as modules, built from whatever operations were resolved.

Every module binds its operations when it is built: `ops` maps component names to callables; without it, the registry
chooses. A forward pass therefore never looks anything up. The names in the state dict are the course's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .components import multihead_self_attention as multihead_self_attention_contract
from .components import transformer_block as transformer_block_contract
from .components import transformer_lm as transformer_lm_contract
from .components.rope import rotation_tables

Operations = Mapping[str, Callable[..., Any]]
Placement = torch.device | str | None


def bind(ops: Operations | None, *names: str) -> Operations:
    """The operations `names`: taken from `ops`, or chosen by the registry where ops is None."""
    if ops is None:
        from . import operations

        return operations(names)
    missing = [name for name in names if name not in ops]
    if missing:
        raise ValueError(f"ops lacks {', '.join(missing)}: add them, or leave ops out and let the registry choose")
    return ops


def truncated_normal(
    *shape: int, std: float, device: Placement = None, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """A parameter drawn from a normal distribution that is cut off at three standard deviations."""
    weight = torch.empty(*shape, device=device, dtype=dtype)
    return nn.Parameter(nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-3 * std, b=3 * std))


class Linear(nn.Module):
    """`x @ weight.T`, without a bias. weight: (d_out, d_in), drawn with standard deviation sqrt(2 / (d_in + d_out))."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        ops: Operations | None = None,
        device: Placement = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = bind(ops, "linear")["linear"]
        self.weight = truncated_normal(d_out, d_in, std=(2 / (d_in + d_out)) ** 0.5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, self.weight)


class Embedding(nn.Module):
    """One row per token id. weight: (vocab_size, d_model), drawn with standard deviation 1."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        ops: Operations | None = None,
        device: Placement = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embedding = bind(ops, "embedding")["embedding"]
        self.weight = truncated_normal(vocab_size, d_model, std=1.0, device=device, dtype=dtype)

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """Root mean square normalisation with a gain that starts at 1.

    `norm(x)` is the normalised x; `norm(x, residual)` adds first and returns (the normalised sum, the sum in residual's
    dtype).
    """

    def __init__(
        self,
        d_model: int,
        eps: float = 1e-5,
        *,
        ops: Operations | None = None,
        device: Placement = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ops = bind(ops, "rmsnorm", "add_rmsnorm")
        self.rmsnorm, self.add_rmsnorm, self.eps = ops["rmsnorm"], ops["add_rmsnorm"], eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return self.rmsnorm(x, self.weight, self.eps)
        # Under autocast a sublayer's result is narrower than the residual stream, which keeps its dtype.
        return self.add_rmsnorm(x.to(residual.dtype), residual, self.weight, self.eps)


class SwiGLU(nn.Module):
    """The gated feed-forward network `w2(silu(w1 x) * w3 x)`."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        ops: Operations | None = None,
        device: Placement = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ops = bind(ops, "linear", "swiglu")
        self.swiglu = ops["swiglu"]
        self.w1 = Linear(d_model, d_ff, ops=ops, device=device, dtype=dtype)
        self.w2 = Linear(d_ff, d_model, ops=ops, device=device, dtype=dtype)
        self.w3 = Linear(d_model, d_ff, ops=ops, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.swiglu(self.w1(x), self.w3(x)))


class SiLUFeedForward(nn.Module):
    """The feed-forward network without a gate, `w2(silu(w1 x))`; d_ff = 1.5 × SwiGLU's gives as many parameters."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        ops: Operations | None = None,
        device: Placement = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ops = bind(ops, "linear", "silu")
        self.silu = ops["silu"]
        self.w1 = Linear(d_model, d_ff, ops=ops, device=device, dtype=dtype)
        self.w2 = Linear(d_ff, d_model, ops=ops, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.silu(self.w1(x)))


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by the angles of their positions, from tables of max_seq_len rows.

    The tables are computed in float64 and stay float32 when the module is converted to another dtype; they are not in
    the state dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        theta: float,
        d_head: int,
        max_seq_len: int,
        *,
        ops: Operations | None = None,
        device: Placement = None,
    ) -> None:
        super().__init__()
        self.rope = bind(ops, "rope")["rope"]
        self.theta, self.d_head, self.max_seq_len = theta, d_head, max_seq_len
        cos, sin = rotation_tables(d_head, max_seq_len, theta, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor | None = None, token_positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self.rope(q, k, self.cos, self.sin, token_positions)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        # Every conversion passes here (.to, .half, .cuda, .to_empty): follow the device, never the dtype.
        super()._apply(fn, recurse)
        self.cos, self.sin = rotation_tables(self.d_head, self.max_seq_len, self.theta, self.cos.device)
        return self


class LayerCache:
    """The keys and values that one layer has seen, in buffers of max_seq_len rows."""

    def __init__(self, max_seq_len: int) -> None:
        self.max_seq_len, self.length = max_seq_len, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep k and v, (..., kv_heads, new, d_head), and return all keys and values so far, as views."""
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("a KV cache has no gradient: call the model under torch.no_grad()")
        start, stop = self.length, self.length + k.shape[-2]
        if stop > self.max_seq_len:
            raise ValueError(f"the KV cache holds {self.max_seq_len} tokens, {stop} are too many: start a new cache")
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_empty(*x.shape[:-2], self.max_seq_len, x.shape[-1]) for x in (k, v))
        self.keys[..., start:stop, :], self.values[..., start:stop, :] = k, v
        self.length = stop
        return self.keys[..., :stop, :], self.values[..., :stop, :]


class KVCache:
    """What a model has seen, layer by layer, so that a new token costs one row of attention instead of all of them."""

    def __init__(self, num_layers: int, max_seq_len: int) -> None:
        self.layers = [LayerCache(max_seq_len) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """How many tokens have been seen."""
        return self.layers[0].length


class MultiHeadSelfAttention(nn.Module):
    """Causal multi-head self-attention, with rotary positions where rope_theta is given."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        max_seq_len: int | None = None,
        rope_theta: float | None = None,
        num_kv_heads: int | None = None,
        ops: Operations | None = None,
        device: Placement = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        multihead_self_attention_contract.check(d_model, num_heads, max_seq_len, rope_theta, num_kv_heads)
        ops = bind(ops, "linear", "attention", *(() if rope_theta is None else ("rope",)))
        self.attention = ops["attention"]
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.d_head = d_model // num_heads
        d_kv = self.num_kv_heads * self.d_head
        self.q_proj = Linear(d_model, d_model, ops=ops, device=device, dtype=dtype)
        self.k_proj = Linear(d_model, d_kv, ops=ops, device=device, dtype=dtype)
        self.v_proj = Linear(d_model, d_kv, ops=ops, device=device, dtype=dtype)
        self.output_proj = Linear(d_model, d_model, ops=ops, device=device, dtype=dtype)
        self.rope = None
        if rope_theta is not None and max_seq_len is not None:
            self.rope = RotaryEmbedding(rope_theta, self.d_head, max_seq_len, ops=ops, device=device)

    def forward(self, x: Tensor, token_positions: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """x: (..., seq, d_model), token_positions: (..., seq) or (seq,), by default counted on from the cache."""
        if x.ndim == 2:  # attention needs a batch dimension to tell heads from batches
            return self.forward(x.unsqueeze(0), token_positions, cache).squeeze(0)
        q = self._split(self.q_proj(x), self.num_heads)
        k = self._split(self.k_proj(x), self.num_kv_heads)
        v = self._split(self.v_proj(x), self.num_kv_heads)
        seen, seq = (0 if cache is None else cache.length), x.shape[-2]
        if self.rope is not None:
            if token_positions is None and seen:
                token_positions = torch.arange(seen, seen + seq, device=x.device)
            q, k = self.rope(q, k, token_positions)
        if cache is not None:
            k, v = cache.append(k, v)
        if not seen:
            attended = self.attention(q, k, v, is_causal=True)
        elif seq == 1:
            attended = self.attention(q, k, v)
        else:
            mask = torch.ones(seq, seen + seq, dtype=torch.bool, device=x.device).tril(seen)
            attended = self.attention(q, k, v, mask)
        return self.output_proj(attended.transpose(-3, -2).flatten(-2))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """(..., seq, heads · d_head) to (..., heads, seq, d_head)."""
        return x.unflatten(-1, (heads, self.d_head)).transpose(-3, -2)


class TransformerBlock(nn.Module):
    """Self-attention and a feed-forward network, each added to the residual stream.

    norm: "rms" normalises what a sublayer reads, "post" what it has added to, "none" nothing. ffn: "swiglu" or "silu".
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        max_seq_len: int | None = None,
        rope_theta: float | None = None,
        num_kv_heads: int | None = None,
        norm: str = "rms",
        ffn: str = "swiglu",
        norm_eps: float = 1e-5,
        ops: Operations | None = None,
        device: Placement = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        transformer_block_contract.check(d_ff, norm, ffn)
        self.norm = norm
        self.attn = MultiHeadSelfAttention(
            d_model,
            num_heads,
            max_seq_len=max_seq_len,
            rope_theta=rope_theta,
            num_kv_heads=num_kv_heads,
            ops=ops,
            device=device,
            dtype=dtype,
        )
        feed_forward = SwiGLU if ffn == "swiglu" else SiLUFeedForward
        self.ffn = feed_forward(d_model, d_ff, ops=ops, device=device, dtype=dtype)
        if norm != "none":
            self.ln1 = RMSNorm(d_model, norm_eps, ops=ops, device=device, dtype=dtype)
            self.ln2 = RMSNorm(d_model, norm_eps, ops=ops, device=device, dtype=dtype)

    def forward(self, x: Tensor, token_positions: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        if self.norm == "rms":
            normed, x = self.ln2(self.attn(self.ln1(x), token_positions, cache), x)
            return x + self.ffn(normed)
        if self.norm == "post":
            x, _ = self.ln1(self.attn(x, token_positions, cache), x)
            x, _ = self.ln2(self.ffn(x), x)
            return x
        x = x + self.attn(x, token_positions, cache)
        return x + self.ffn(x)


class TransformerLM(nn.Module):
    """A decoder-only language model: embeddings, blocks, a last norm and the projection to logits.

    position: "rope", or "none" for no positions at all (also with rope_theta = None). tie_embeddings: the projection
    shares the embeddings' weight. norm and ffn: see TransformerBlock; norm = "none" drops the last norm too.
    """

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
        num_kv_heads: int | None = None,
        norm: str = "rms",
        position: str = "rope",
        ffn: str = "swiglu",
        tie_embeddings: bool = False,
        norm_eps: float = 1e-5,
        ops: Operations | None = None,
        device: Placement = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        transformer_lm_contract.check(vocab_size, context_length, num_layers, position)
        self.context_length, self.num_layers = context_length, num_layers
        self.token_embeddings = Embedding(vocab_size, d_model, ops=ops, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            TransformerBlock(
                d_model,
                num_heads,
                d_ff,
                max_seq_len=context_length,
                rope_theta=rope_theta if position == "rope" else None,
                num_kv_heads=num_kv_heads,
                norm=norm,
                ffn=ffn,
                norm_eps=norm_eps,
                ops=ops,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_layers)
        )
        self.ln_final = None
        if norm != "none":
            self.ln_final = RMSNorm(d_model, norm_eps, ops=ops, device=device, dtype=dtype)
        self.lm_head = Linear(d_model, vocab_size, ops=ops, device=device, dtype=dtype)
        if tie_embeddings:
            # The projection's smaller standard deviation serves both: with 1, the first logits would be far apart.
            self.token_embeddings.weight = self.lm_head.weight

    def forward(self, token_ids: Tensor, token_positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """token_ids: (..., seq) to logits (..., seq, vocab_size)."""
        return self.lm_head(self.hidden_states(token_ids, token_positions, cache))

    def hidden_states(
        self, token_ids: Tensor, token_positions: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What the projection to logits reads, (..., seq, d_model): for losses that never hold all logits."""
        seen = 0 if cache is None else cache.length
        if seen + token_ids.shape[-1] > self.context_length:
            raise ValueError(
                f"transformer_lm: a sequence of {seen + token_ids.shape[-1]} tokens is longer than context_length "
                f"{self.context_length}: cut it, or build the model with a longer context"
            )
        x = self.token_embeddings(token_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, token_positions, None if cache is None else cache.layers[index])
        return x if self.ln_final is None else self.ln_final(x)

    def new_cache(self) -> KVCache:
        """An empty KV cache for this model: pass it to every call, each time with the new tokens alone."""
        return KVCache(self.num_layers, self.context_length)
