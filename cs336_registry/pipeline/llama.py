"""The same model in Hugging Face's Llama layout: configuration, names of the weights, and the order of rotated rows.

Here RoPE rotates neighbouring features, (2i, 2i+1), as the paper does; Llama's code there rotates feature i of a head
with feature i + d_head / 2. Both compute the same scores when the rows of the query and key projections are reordered
within each head, which is what `halves` and `pairs` do. https://arxiv.org/abs/2104.09864, equation 34.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..components import transformer_lm as transformer_lm_contract
from .configuration import ModelConfiguration

State = Mapping[str, Tensor]

NORM_EPS: float = transformer_lm_contract.contract.parameters["norm_eps"].default
"""Every run uses the contract's eps: it is no hyper-parameter."""

EXPRESSIBLE = {"norm": "rms", "position": "rope", "ffn": "swiglu"}
REASONS = {
    "norm": "Llama normalises what each sublayer reads, and nothing else",
    "position": "Llama rotates queries and keys by their positions, always",
    "ffn": "Llama's feed-forward network has a gate and three matrices",
}
IN_BLOCK = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
}
AROUND = {"token_embeddings": "model.embed_tokens", "ln_final": "model.norm", "lm_head": "lm_head"}


def names(settings: ModelConfiguration) -> dict[str, str]:
    """The name of every weight here -> its name there; a tied projection has none of its own."""
    found = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in AROUND.items()}
    for layer in range(settings.num_layers):
        found |= {
            f"layers.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight"
            for ours, theirs in IN_BLOCK.items()
        }
    if settings.tie_embeddings:
        del found["lm_head.weight"]
    return found


def check_expressible(settings: ModelConfiguration) -> None:
    """Raise ValueError, with every reason, where Llama's layout has no place for the model."""
    misfits = [
        f"{key} = {getattr(settings, key)!r} ({REASONS[key]})"
        for key, wanted in EXPRESSIBLE.items()
        if getattr(settings, key) != wanted
    ]
    if misfits:
        raise ValueError(
            f"this model can't be written as Llama: {'; '.join(misfits)}. Only norm = 'rms', position = 'rope', ffn = "
            f"'swiglu' can; train such a model to export it"
        )


def configuration(settings: ModelConfiguration, end_of_text_id: int | None) -> dict[str, Any]:
    """config.json; end_of_text_id is None where the tokenizer has no special token.

    rope_theta stands twice: where version 5 of the library reads it, and where version 4 does.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": settings.vocab_size,
        "max_position_embeddings": settings.context_length,
        "hidden_size": settings.d_model,
        "intermediate_size": settings.d_ff,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads or settings.num_heads,
        "head_dim": settings.d_model // settings.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": settings.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": settings.tie_embeddings,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def to_llama(state: State, settings: ModelConfiguration) -> dict[str, Tensor]:
    """The weights under Llama's names, with q's and k's rows in Llama's order."""
    heads = _rotated_heads(settings)
    return {
        theirs: (halves(state[ours], heads[kind]) if (kind := _projection(ours)) else state[ours]).contiguous()
        for ours, theirs in names(settings).items()
    }


def from_llama(state: State, settings: ModelConfiguration) -> dict[str, Tensor]:
    """The other way: `from_llama(to_llama(state)) == state`, bit for bit."""
    heads = _rotated_heads(settings)
    found = {
        ours: (pairs(state[theirs], heads[kind]) if (kind := _projection(ours)) else state[theirs]).contiguous()
        for ours, theirs in names(settings).items()
    }
    if settings.tie_embeddings:
        found["lm_head.weight"] = found["token_embeddings.weight"]
    return found


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads · d_head, d_in): within each head, the even rows first, then the odd ones."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def pairs(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `halves`: row i of a head's first half is followed by row i of its second half."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _rotated_heads(settings: ModelConfiguration) -> dict[str, int]:
    return {"q_proj": settings.num_heads, "k_proj": settings.num_kv_heads or settings.num_heads}


def _projection(name: str) -> str | None:
    """ "q_proj" or "k_proj" where the weight makes what RoPE rotates."""
    part = name.split(".")[-2]
    return part if part in ("q_proj", "k_proj") else None
