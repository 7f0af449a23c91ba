"""What a configuration costs before anything is built: parameters and operations part by part, memory and disk.

Counts of parameters and operations are exact and agree with `accounting`, which counts a built model. Memory is what
training must hold: four numbers a parameter with AdamW, and what the backward pass needs of the forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from .configuration import Configuration, ModelConfiguration

FLOAT32 = 4
"""Bytes. Weights, gradients and AdamW's two moments are float32 in every precision that can be configured."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at its peak, apart from what Python and PyTorch themselves take."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def parameters(settings: ModelConfiguration) -> dict[str, int]:
    """Parameters by part of the model; a tied projection to logits counts 0."""
    d, layers = settings.d_model, settings.num_layers
    norms = 0 if settings.norm == "none" else (2 * layers + 1) * d
    return {
        "token embeddings": settings.vocab_size * d,
        "attention: q, k, v": layers * d * (d + 2 * _d_kv(settings)),
        "attention: output": layers * d * d,
        "feed-forward": layers * _ffn_matrices(settings) * d * settings.d_ff,
        "norms": norms,
        "projection to logits": 0 if settings.tie_embeddings else settings.vocab_size * d,
    }


def forward_flops(settings: ModelConfiguration, tokens: int | None = None) -> dict[str, int]:
    """Floating-point operations of the matrix products of one sequence's forward pass, by part.

    A product of (m, n) and (n, p) is 2·m·n·p. Attention is counted as the whole square, without leaving out what is
    masked. tokens: the sequence's length; default: the context length.
    """
    t = tokens or settings.context_length
    d, layers = settings.d_model, settings.num_layers
    return {
        "attention: q, k, v": 2 * t * layers * d * (d + 2 * _d_kv(settings)),
        "attention: scores q kᵀ": 2 * t * t * layers * d,
        "attention: weights v": 2 * t * t * layers * d,
        "attention: output": 2 * t * layers * d * d,
        "feed-forward": 2 * t * layers * _ffn_matrices(settings) * d * settings.d_ff,
        "projection to logits": 2 * t * d * settings.vocab_size,
    }


def training_memory(configuration: Configuration, *, fused: bool = False) -> Memory:
    """The peak of a training step. fused: attention keeps no square of scores, and the loss keeps the logits once.

    What the backward pass keeps of a block, in numbers per token, was counted on the textbook and the PyTorch backend:
    10 d_model + 5 d_ff + 3 heads · context (fused: 11 d_model + 4 d_ff), and around the blocks 3 d_model + 3
    vocab_size (fused: vocab_size). SiLU without a gate keeps 2 d_ff less, and a block without norms 4 d_model. Under
    bfloat16 a little less is kept.
    """
    settings, training = configuration.model, configuration.training
    count = sum(parameters(settings).values())
    d, d_ff = settings.d_model, settings.d_ff
    tokens = training.batch_size // training.gradient_accumulation * settings.context_length
    scores = 0 if fused else 3 * settings.num_heads * settings.context_length
    absent = (2 * d_ff if settings.ffn == "silu" else 0) + (4 * d if settings.norm == "none" else 0)
    block = (11 * d + 4 * d_ff if fused else 10 * d + 5 * d_ff) - absent + scores
    blocks = settings.num_layers * block
    if training.activation_checkpointing:
        blocks = settings.num_layers * d + block
    around = 3 * d + (1 if fused else 3) * settings.vocab_size
    return Memory(
        weights=FLOAT32 * count,
        gradients=FLOAT32 * count,
        optimizer=2 * FLOAT32 * count,
        activations=FLOAT32 * tokens * (blocks + around),
    )


def checkpoint_bytes(configuration: Configuration) -> int:
    """The most that a run's checkpoints take: those that are kept, the best one, and the one being written."""
    kept = configuration.checkpoint.keep_last + int(configuration.checkpoint.keep_best) + 1
    return kept * 3 * FLOAT32 * sum(parameters(configuration.model).values())


def _d_kv(settings: ModelConfiguration) -> int:
    return settings.d_model // settings.num_heads * (settings.num_kv_heads or settings.num_heads)


def _ffn_matrices(settings: ModelConfiguration) -> int:
    return 3 if settings.ffn == "swiglu" else 2
