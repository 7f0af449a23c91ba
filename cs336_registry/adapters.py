"""The course's adapter functions over the active backend: `from cs336_registry.adapters import *` is a whole
adapters.py.

Each function asks the registry when it is called, so `registry.use(...)`, `--backend` and CS336_BACKEND decide what
runs. Names and parameters are those of the course's assignments 1 and 2.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import IO, TYPE_CHECKING, Any

import cs336_registry as registry

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

__all__ = [
    "ddp_on_after_backward",
    "fsdp_gather_full_params",
    "fsdp_on_after_backward",
    "get_adamw_cls",
    "get_ddp",
    "get_flashattention_autograd_function_pytorch",
    "get_flashattention_autograd_function_triton",
    "get_fsdp",
    "get_sharded_optimizer",
    "get_tokenizer",
    "run_cross_entropy",
    "run_embedding",
    "run_get_batch",
    "run_get_lr_cosine_schedule",
    "run_gradient_clipping",
    "run_linear",
    "run_load_checkpoint",
    "run_multihead_self_attention",
    "run_multihead_self_attention_with_rope",
    "run_rmsnorm",
    "run_rope",
    "run_save_checkpoint",
    "run_scaled_dot_product_attention",
    "run_silu",
    "run_softmax",
    "run_swiglu",
    "run_train_bpe",
    "run_transformer_block",
    "run_transformer_lm",
]


def run_linear(
    d_in: int, d_out: int, weights: Float[Tensor, " d_out d_in"], in_features: Float[Tensor, " ... d_in"]
) -> Float[Tensor, " ... d_out"]:
    """`in_features @ weights.T`."""
    return registry.get("linear")(in_features, _shaped("run_linear", "weights", weights, (d_out, d_in)))


def run_embedding(
    vocab_size: int, d_model: int, weights: Float[Tensor, " vocab_size d_model"], token_ids: Int[Tensor, " ..."]
) -> Float[Tensor, " ... d_model"]:
    """The rows of `weights` that `token_ids` name."""
    return registry.get("embedding")(token_ids, _shaped("run_embedding", "weights", weights, (vocab_size, d_model)))


def run_swiglu(
    d_model: int,
    d_ff: int,
    w1_weight: Float[Tensor, " d_ff d_model"],
    w2_weight: Float[Tensor, " d_model d_ff"],
    w3_weight: Float[Tensor, " d_ff d_model"],
    in_features: Float[Tensor, " ... d_model"],
) -> Float[Tensor, " ... d_model"]:
    """The feed-forward network `(silu(x @ w1.T) * (x @ w3.T)) @ w2.T`."""
    from .nn import SwiGLU

    weights = {"w1.weight": w1_weight, "w2.weight": w2_weight, "w3.weight": w3_weight}
    return _run(SwiGLU(d_model, d_ff, **_meta()), weights, in_features)


def run_silu(in_features: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """`x * sigmoid(x)`."""
    return registry.get("silu")(in_features)


def run_rmsnorm(
    d_model: int, eps: float, weights: Float[Tensor, " d_model"], in_features: Float[Tensor, " ... d_model"]
) -> Float[Tensor, " ... d_model"]:
    """Root mean square normalisation with the gain `weights`."""
    return registry.get("rmsnorm")(in_features, _shaped("run_rmsnorm", "weights", weights, (d_model,)), eps)


def run_softmax(in_features: Float[Tensor, " ..."], dim: int) -> Float[Tensor, " ..."]:
    """Softmax over `dim`."""
    return registry.get("softmax")(in_features, dim)


def run_cross_entropy(
    inputs: Float[Tensor, " batch_size vocab_size"], targets: Int[Tensor, " batch_size"]
) -> Float[Tensor, ""]:
    """The mean cross entropy of `targets` under the logits `inputs`, in nats."""
    return registry.get("cross_entropy")(inputs, targets)


def run_scaled_dot_product_attention(
    Q: Float[Tensor, " ... queries d_k"],
    K: Float[Tensor, " ... keys d_k"],
    V: Float[Tensor, " ... keys d_v"],
    mask: Bool[Tensor, " ... queries keys"] | None = None,
) -> Float[Tensor, " ... queries d_v"]:
    """`softmax(Q @ K.T / sqrt(d_k)) @ V` where `mask` is True, for any leading dimensions."""
    return registry.get("attention")(Q, K, V, mask)


def run_rope(
    d_k: int,
    theta: float,
    max_seq_len: int,
    in_query_or_key: Float[Tensor, " ... sequence_length d_k"],
    token_positions: Int[Tensor, " ... sequence_length"],
) -> Float[Tensor, " ... sequence_length d_k"]:
    """Rotary position embedding of interleaved pairs (2i, 2i + 1)."""
    from .components.rope import rotation_tables

    if in_query_or_key.shape[-1] != d_k:
        raise ValueError(f"run_rope: d_k is {d_k} but in_query_or_key has shape {tuple(in_query_or_key.shape)}")
    cos, sin = (table.to(in_query_or_key.device) for table in rotation_tables(d_k, max_seq_len, theta))
    return registry.get("rope")(in_query_or_key, None, cos, sin, token_positions)[0]


def run_multihead_self_attention(
    d_model: int,
    num_heads: int,
    q_proj_weight: Float[Tensor, " d_model d_model"],
    k_proj_weight: Float[Tensor, " d_model d_model"],
    v_proj_weight: Float[Tensor, " d_model d_model"],
    o_proj_weight: Float[Tensor, " d_model d_model"],
    in_features: Float[Tensor, " ... sequence_length d_model"],
) -> Float[Tensor, " ... sequence_length d_model"]:
    """Causal multi-head self-attention without positions."""
    from .nn import MultiHeadSelfAttention

    weights = _projections(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return _run(MultiHeadSelfAttention(d_model, num_heads, **_meta()), weights, in_features)


def run_multihead_self_attention_with_rope(
    d_model: int,
    num_heads: int,
    max_seq_len: int,
    theta: float,
    q_proj_weight: Float[Tensor, " d_model d_model"],
    k_proj_weight: Float[Tensor, " d_model d_model"],
    v_proj_weight: Float[Tensor, " d_model d_model"],
    o_proj_weight: Float[Tensor, " d_model d_model"],
    in_features: Float[Tensor, " ... sequence_length d_model"],
    token_positions: Int[Tensor, " ... sequence_length"] | None = None,
) -> Float[Tensor, " ... sequence_length d_model"]:
    """Causal multi-head self-attention with rotary positions."""
    from .nn import MultiHeadSelfAttention

    weights = _projections(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    settings = {"max_seq_len": max_seq_len, "rope_theta": theta, "device": in_features.device}
    module = MultiHeadSelfAttention(d_model, num_heads, **settings)
    return _run(module, weights, in_features, token_positions)


def run_transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    max_seq_len: int,
    theta: float,
    weights: dict[str, Tensor],
    in_features: Float[Tensor, " batch sequence_length d_model"],
) -> Float[Tensor, " batch sequence_length d_model"]:
    """A pre-norm block; `weights` are named as in its state dict (`attn.q_proj.weight`, `ln1.weight`, ...)."""
    from .nn import TransformerBlock

    settings = {"max_seq_len": max_seq_len, "rope_theta": theta, "device": in_features.device}
    module = TransformerBlock(d_model, num_heads, d_ff, **settings)
    return _run(module, weights, in_features)


def run_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: dict[str, Tensor],
    in_indices: Int[Tensor, " batch_size sequence_length"],
) -> Float[Tensor, " batch_size sequence_length vocab_size"]:
    """The logits of a Transformer language model with `weights`, named as in its state dict."""
    from .nn import TransformerLM

    sizes = (vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta)
    return _run(TransformerLM(*sizes, device=in_indices.device), weights, in_indices)


def run_get_batch(
    dataset: npt.NDArray[Any], batch_size: int, context_length: int, device: str
) -> tuple[Tensor, Tensor]:
    """Random windows of `dataset` and their next tokens, on `device`."""
    return registry.get("get_batch")(dataset, batch_size, context_length, device)


def run_gradient_clipping(parameters: Iterable[torch.nn.Parameter], max_l2_norm: float) -> None:
    """Scale all gradients in place so that their joint norm is at most `max_l2_norm`."""
    registry.get("gradient_clipping")(parameters, max_l2_norm)


def get_adamw_cls() -> Any:
    """The AdamW optimizer class."""
    return registry.get("adamw")


def run_get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """The learning rate of iteration `it`."""
    schedule = registry.get("lr_cosine_schedule")
    return schedule(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)


def run_save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike[str] | IO[bytes],
) -> None:
    """Write a checkpoint."""
    registry.get("save_checkpoint")(model, optimizer, iteration, out)


def run_load_checkpoint(
    src: str | os.PathLike[str] | IO[bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint into `model` and `optimizer`; returns its iteration."""
    return registry.get("load_checkpoint")(src, model, optimizer)


def get_tokenizer(
    vocab: dict[int, bytes], merges: list[tuple[bytes, bytes]], special_tokens: list[str] | None = None
) -> Any:
    """A byte-level BPE tokenizer."""
    return registry.get("tokenizer")(vocab, merges, special_tokens)


def run_train_bpe(
    input_path: str | os.PathLike[str], vocab_size: int, special_tokens: list[str], **kwargs: Any
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """The vocab and merges that byte-level BPE learns from the file; kwargs go to the trainer."""
    return registry.get("bpe_trainer")(input_path, vocab_size, special_tokens, **kwargs)


def get_flashattention_autograd_function_pytorch() -> type:
    """FlashAttention-2 in plain PyTorch: an autograd Function with `apply(q, k, v, is_causal)`."""
    from cs336_reference.flash_attention import FlashAttention2

    return FlashAttention2


def get_flashattention_autograd_function_triton() -> type:
    """FlashAttention-2 as Triton kernels: an autograd Function with `apply(q, k, v, is_causal)`.

    Raises UnavailableError, with the reason and the cure, where backend triton can't serve attention.
    """
    registry.get("attention", backend="attention=triton")
    from cs336_triton.attention import FlashAttention2

    return FlashAttention2


def get_ddp(module: torch.nn.Module) -> torch.nn.Module:
    """`module` wrapped for data-parallel training."""
    return registry.get("ddp")(module)


def ddp_on_after_backward(ddp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """To be called after backward and before the step: waits for the gradients' averages."""
    ddp_model.finish_gradient_synchronization()  # type: ignore[operator]


def get_fsdp(module: torch.nn.Module, compute_dtype: torch.dtype | None = None) -> torch.nn.Module:
    """`module` wrapped for fully sharded data-parallel training."""
    return registry.get("fsdp")(module, compute_dtype)


def fsdp_on_after_backward(fsdp_model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """To be called after backward and before the step: waits for the gradients' parts."""
    fsdp_model.finish_gradient_synchronization()  # type: ignore[operator]


def fsdp_gather_full_params(fsdp_model: torch.nn.Module) -> dict[str, Tensor]:
    """The whole model's state dict under its own names, on every rank."""
    return fsdp_model.gather_full_parameters()  # type: ignore[operator]


def get_sharded_optimizer(
    params: Iterable[Any], optimizer_cls: type[torch.optim.Optimizer], **kwargs: Any
) -> torch.optim.Optimizer:
    """`optimizer_cls(params, **kwargs)` with its states cut over the ranks."""
    return registry.get("sharded_optimizer")(params, optimizer_cls, **kwargs)


def _shaped(function: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}, the sizes given make it {shape}")
    return tensor


def _meta() -> dict[str, Any]:
    """A module without storage: its weights are given with the call."""
    return {"device": "meta"}


def _projections(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> dict[str, Tensor]:
    return {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "output_proj.weight": o}


def _run(module: torch.nn.Module, weights: Mapping[str, Tensor], *inputs: Any) -> Tensor:
    """`module(*inputs)` with `weights` in place of its own, so that gradients reach them; names and shapes must fit."""
    import torch

    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    # An export may hold more than parameters (RoPE tables, say); what is missing or of another shape is an error.
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise ValueError(f"weights lack {', '.join(missing)}: they have {', '.join(weights)}")
    for name, shape in wanted.items():
        _shaped(f"{type(module).__name__}", name, weights[name], shape)
    return torch.func.functional_call(module, {name: weights[name] for name in wanted}, inputs)
