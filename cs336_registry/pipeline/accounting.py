"""Counting parameters, floating-point operations, memory and the share of a device's peak that a run reaches."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .configuration import ModelConfiguration

if TYPE_CHECKING:
    from torch import nn

DENSE_BFLOAT16_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "V100": 125}
"""Peak of dense bfloat16 products with float32 sums, from the makers' data sheets (V100: float16); no sparsity."""


@dataclass(frozen=True)
class Accounting:
    """parameters: all; matmul_parameters: those that multiply activations (without the embedding's table)."""

    parameters: int
    matmul_parameters: int
    flops_per_token: float


def account(model: nn.Module, configuration: ModelConfiguration) -> Accounting:
    """Training costs 6 operations per token and matmul parameter (2 forward, 4 backward), and attention's two products
    12 · layers · d_model · context_length (the whole square, as PaLM counts: https://arxiv.org/abs/2204.02311, B).
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    matmul = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name)
    if configuration.tie_embeddings:
        matmul += configuration.vocab_size * configuration.d_model
    attention = 12.0 * configuration.num_layers * configuration.d_model * configuration.context_length
    return Accounting(parameters, matmul, 6.0 * matmul + attention)


def peak_flops(device: str, precision: str) -> float | None:
    """Operations per second that the device could do at best; None where no peak is known."""
    if not device.startswith("cuda") or precision != "bfloat16":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in DENSE_BFLOAT16_TFLOPS.items() if key in name), None)


def peak_memory(device: str) -> int:
    """Bytes: the most this process has held, on the GPU or in main memory."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024
