"""The linear map: cuBLAS, through PyTorch, forward and backward.

No kernel of ours: without an epilogue to fuse, a matrix product has nothing to gain from Triton. cuBLAS reaches the
card's matrix limit at the sizes of a language model, forward and backward, and PyTorch's operator brings autocast, fake
tensors and torch.compile along. Where a fused epilogue does pay, after the output embedding, see linear_cross_entropy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cs336_registry.components.linear import check

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def linear(x: Float[Tensor, "... d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "... d_out"]:
    """`x @ weight.T` by cuBLAS, which nothing here beats without an epilogue to fuse; see the contract."""
    check(x, weight)
    return torch.nn.functional.linear(x, weight)
