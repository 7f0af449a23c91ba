"""The built-in components, in the order data flows through them. One contract each, in the file of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

NAMES = (
    "pretoken_counter",
    "bpe_trainer",
    "tokenizer",
    "get_batch",
    "embedding",
    "linear",
    "rmsnorm",
    "add_rmsnorm",
    "silu",
    "swiglu",
    "rope",
    "softmax",
    "attention",
    "multihead_self_attention",
    "transformer_block",
    "transformer_lm",
    "cross_entropy",
    "linear_cross_entropy",
    "gradient_clipping",
    "adamw",
    "lr_cosine_schedule",
    "save_checkpoint",
    "load_checkpoint",
    "generate",
    "ddp",
    "fsdp",
    "sharded_optimizer",
)

BUILTIN: Mapping[str, str] = MappingProxyType({name: f"cs336_registry.components.{name}:contract" for name in NAMES})
