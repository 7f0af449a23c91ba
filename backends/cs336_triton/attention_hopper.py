"""Attention on H100 and H200: the host side of `attention_hopper_kernels`, which `attention` asks first.

They serve bfloat16 and float16 with 64 or 128 features, causal or full, grouped heads, any lengths and any strides that
the copy engine can follow, without a mask and without documents. What they don't serve, `attention_kernels` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .configurations import Configuration, configuration
from .runtime import Card, card, cdiv, launch

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import attention_hopper_kernels as kernels
except ImportError:  # Gluon is experimental: another Triton may have moved it.
    AVAILABLE = False
else:
    AVAILABLE = True

WIDTHS = (64, 128)
ROWS = 64
"""Rows of one consumer."""
BACKWARD_ROWS = 128
"""Rows of the two consumers of a backward kernel, and what statistics are padded to: no tile of queries is longer."""
SAVED_ROWS = 256
"""Rows of the four consumers of the kernel that makes dQ from saved gradients."""
SAVING_WIDTHS = (128,)
"""Where saving the gradients of the scores is worth it."""
WORKSPACE_BYTES = 1 << 30
"""What the saved gradients of scores may take."""
SHORTEST = 128
"""Fewer queries or keys than this are not worth the forward kernel's start."""
SHORT = 2048
"""Below this many queries, tiles of 192 at 64 features leave too many rows empty."""
L2_BYTES = 32 << 20
"""Of the cache of 50 MiB, what the two tensors may take that a section reads again and again."""


def serves(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether `forward` can take these inputs, without a mask, and is worth its start: (batch, heads, length, d)."""
    return (
        _served(q, k, v)
        and min(q.shape[2], k.shape[2]) >= SHORTEST
        and q.shape[0] * q.shape[1] > 0
        # The largest score has the largest weight: the maximum is taken before the factor.
        and scale > 0.0
    )


def serves_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `backward` can take these inputs, without a mask. Statistics are addressed in int32."""
    return (
        _served(q, k, v)
        and describable(grad)
        and 0 not in q.shape
        and 0 not in k.shape
        and max(*q.shape[:2], *k.shape[:2]) < 65536
        and q.shape[0] * q.shape[1] * _padded_length(q.shape[2]) < 2**31
    )


def _served(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        AVAILABLE
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in WIDTHS
        and v.shape[3] == q.shape[3]
        and card(q.device).capability == (9, 0)
        and describable(q)
        and describable(k)
        and describable(v)
    )


def forward(q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float) -> None:
    """Fill `output`, with the sizes and order of dimensions of q, and the LSE, contiguous (batch, heads, queries)."""
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads

    def run(chosen: Configuration) -> None:
        block = chosen["BLOCK_N"]
        tiles = cdiv(queries, ROWS * chosen["CONSUMERS"]) * batch * heads
        section = max(1, L2_BYTES // (2 * keys * d * q.element_size())) * group
        launch(
            kernels.attention_forward_hopper_kernel,
            (min(tiles, card(q.device).multiprocessors),),
            *(lse, described(q, ROWS), described(k, block), described(v, block), described(output, ROWS)),
            *(heads, group, batch * heads, queries, keys, min(section, batch * heads), scale * math.log2(math.e)),
            IS_CAUSAL=is_causal,
            **chosen.keywords,
        )

    kind = "_short" if d == 64 and queries < SHORT else ""
    run(_choose("attention_forward_hopper", q, is_causal, run, kind))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    lse: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    is_causal: bool,
    scale: float,
    *,
    want_q: bool,
    want_kv: bool,
) -> None:
    """Write the gradients that are wanted, with the sizes and orders of dimensions of q, k and v."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    padded = _padded_length(queries)
    # The LSE to the base of 2, and delta.
    statistics = torch.empty((2, batch, heads, padded), dtype=torch.float32, device=lse.device)
    binary_lse, delta = statistics[0], statistics[1]
    rows = 8192 // width
    launch(
        kernels.attention_statistics_kernel,
        (padded // rows * batch * heads,),
        *(output, grad, lse, binary_lse, delta, *output.stride()[:3], *grad.stride()[:3], heads, queries, padded),
        D=width,
        BLOCK_M=rows,
        num_warps=4,
        num_stages=1,
    )
    scales = (scale, scale * math.log2(math.e))
    constants = {"GROUP": group, "IS_CAUSAL": is_causal}
    # Tiles of ROWS rows are described once for all kernels; what is not wanted is empty.
    q_rows, k_rows, v_rows, grad_rows = (described(x, ROWS) for x in (q, k, v, grad))
    grad_q_rows = described(grad_q, ROWS) if want_q else None
    grad_k_rows, grad_v_rows = (described(x, ROWS) if want_kv else None for x in (grad_k, grad_v))
    key_blocks, query_blocks = cdiv(keys, BACKWARD_ROWS), cdiv(queries, BACKWARD_ROWS)
    least = 2 * card(q.device).multiprocessors
    key_section = _section(batch * kv_heads, 2 * group * queries * width, cdiv(least, key_blocks))
    query_section = _section(batch * kv_heads, 2 * keys * width, cdiv(least, query_blocks * group)) * group
    tiles_of_head = saved_tiles(cdiv(queries, ROWS), cdiv(keys, ROWS), is_causal)

    def run_queries(chosen: Configuration) -> None:
        block = chosen["BLOCK_N"]
        k_blocks, v_blocks = (k_rows, v_rows) if block == ROWS else (described(k, block), described(v, block))
        launch(
            kernels.attention_query_gradient_hopper_kernel,
            (query_blocks * batch * heads,),
            *(binary_lse, delta, q_rows, k_blocks, v_blocks, grad_rows, grad_q_rows),
            *(heads, batch * heads, query_section, queries, keys, padded, *scales),
            **constants,
            **chosen.keywords,
        )

    def run_keys(chosen: Configuration, saved: Any = None, first: int = 0, members: int = batch * kv_heads) -> None:
        block = chosen["BLOCK_M"]
        q_blocks, grad_blocks = (q_rows, grad_rows) if block == ROWS else (described(q, block), described(grad, block))
        launch(
            kernels.attention_key_gradient_hopper_kernel,
            (key_blocks * members,),
            *(grad_k, q_blocks, k_rows, v_rows, grad_blocks),
            *(described_numbers(binary_lse, block), described_numbers(delta, block)),
            *(grad_k_rows, grad_v_rows, k_rows if saved is None else saved),
            *(kv_heads, first, members, min(key_section, members), queries, keys, padded, tiles_of_head, *scales),
            **constants,
            SAVES=saved is not None,
            **chosen.keywords,
        )

    def run_saved_queries(saved: Any, first: int, members: int) -> None:
        launch(
            kernels.attention_saved_query_gradient_hopper_kernel,
            (cdiv(queries, SAVED_ROWS) * members * group,),
            *(grad_q, k_rows, saved, grad_q_rows),
            *(heads, first * group, members * group, members * group, queries, keys, tiles_of_head, scale),
            **constants,
            STAGES=3,
            num_warps=4,
            num_stages=1,
        )

    members = 0
    if want_q and want_kv and width in SAVING_WIDTHS:
        members = saving_heads(batch * kv_heads, group * tiles_of_head, key_blocks, card(q.device))
    if members:
        saved = described_squares(q.new_empty((members * group * tiles_of_head, ROWS, ROWS)))
        run_saving = partial(run_keys, saved=saved, members=members)
        kind = "_grouped" if group > 1 else ""
        chosen = _choose("attention_saving_key_gradient_hopper", q, is_causal, run_saving, kind)
        for first in range(0, batch * kv_heads, members):
            some = min(members, batch * kv_heads - first)
            run_keys(chosen, saved, first, some)
            run_saved_queries(saved, first, some)
        return
    if want_q:
        run_queries(_choose("attention_query_gradient_hopper", q, is_causal, run_queries))
    if want_kv:
        run_keys(_choose("attention_key_gradient_hopper", q, is_causal, run_keys))


def _section(heads: int, numbers: int, least: int) -> int:
    """How many of `heads` heads have their turn together: `least`, or as many as fit the L2 cache with `numbers` each.

    Sections are alike.
    """
    return cdiv(heads, cdiv(heads, max(least, L2_BYTES // (2 * numbers))))


def saved_tiles(queries: int, keys: int, is_causal: bool) -> int:
    """How many tiles of a head are saved, of `queries` times `keys`: with a causal mask those that it leaves."""
    seen = min(queries, keys)
    return seen * queries - seen * (seen - 1) // 2 if is_causal else queries * keys


def saving_heads(heads: int, tiles: int, blocks: int, card: Card) -> int:
    """For how many key heads at a time the gradients of the scores are saved, each of `tiles` tiles; 0: not at all."""
    members = min(heads, WORKSPACE_BYTES // (tiles * ROWS * ROWS * 2))
    # A head's programs take from one tile to all: only where there are many, the card is busy to the end.
    if members < heads and members * blocks < 2 * card.multiprocessors:
        return 0
    return cdiv(heads, cdiv(heads, members))


def _padded_length(queries: int) -> int:
    return cdiv(queries, BACKWARD_ROWS) * BACKWARD_ROWS


def _choose(
    kernel: str, q: Tensor, is_causal: bool, run: Callable[[Configuration], None], kind: str = ""
) -> Configuration:
    width = q.shape[3]
    candidates = partial(candidate_configurations, kernel, width, kind=kind)
    return configuration(
        kernel,
        q.device,
        q.dtype,
        f"d{width}{kind}" + ("_causal" if is_causal else ""),
        lambda card: candidates(card)[0],
        candidates=candidates,
        run=run,
    )


def candidate_configurations(kernel: str, width: int, card: Card, *, kind: str = "") -> tuple[Configuration, ...]:
    """Every configuration worth timing, the fastest on an H200 first: for inputs of a kind of their own the last."""
    candidates = _CANDIDATES[kernel, width]
    return tuple(Configuration.of(num_warps=4, num_stages=1, **one) for one in candidates[:: -1 if kind else 1])


_CANDIDATES: dict[tuple[str, int], tuple[dict[str, Any], ...]] = {
    ("attention_forward_hopper", 64): (
        {"CONSUMERS": 3, "BLOCK_N": 128, "STAGES": 2},
        {"CONSUMERS": 2, "BLOCK_N": 128, "STAGES": 2},
    ),
    ("attention_forward_hopper", 128): (
        {"CONSUMERS": 2, "BLOCK_N": 128, "STAGES": 2},
        {"CONSUMERS": 2, "BLOCK_N": 64, "STAGES": 4},
    ),
    ("attention_query_gradient_hopper", 64): (
        {"BLOCK_N": 128, "STAGES": 3, "LAG": False},
        {"BLOCK_N": 128, "STAGES": 4, "LAG": True},
    ),
    ("attention_query_gradient_hopper", 128): (
        {"BLOCK_N": 64, "STAGES": 4, "LAG": True},
        {"BLOCK_N": 128, "STAGES": 2, "LAG": False},
    ),
    ("attention_key_gradient_hopper", 64): (
        {"BLOCK_M": 64, "STAGES": 4, "LAG": True},
        {"BLOCK_M": 64, "STAGES": 3, "LAG": False},
    ),
    ("attention_key_gradient_hopper", 128): (
        {"BLOCK_M": 64, "STAGES": 2, "LAG": False},
        # With few key heads 3 % faster, otherwise 5 % slower: it spills.
        {"BLOCK_M": 64, "STAGES": 3, "LAG": True},
    ),
    ("attention_saving_key_gradient_hopper", 128): (
        {"BLOCK_M": 64, "STAGES": 3, "LAG": True},
        # With fewer key heads 5 % faster, otherwise up to 1.5 % slower.
        {"BLOCK_M": 64, "STAGES": 2, "LAG": False},
    ),
}
"""A tile's rows, the buffers of the ring, and what the kernels say about the rest."""


def describable(x: Tensor) -> bool:
    """Whether the copy engine can follow `x`, of numbers of two bytes.

    Rows have no gaps, every start lies at a multiple of 16 bytes, and nothing is broadcast. Newly allocated tensors in
    the layout of others, with 64 or 128 features, need not be asked.
    """
    *outer, last = x.stride()
    if last != 1 or x.data_ptr() % 16:
        return False
    if _allowed(*outer):
        return True
    return all(size == 1 or _allowed(step, step, step) for size, step in zip(x.shape[:3], outer, strict=True))


def _allowed(batch: int, head: int, row: int) -> bool:
    """Whether these strides are positive multiples of 16 bytes."""
    return (batch | head | row) % 8 == 0 and batch > 0 and head > 0 and row > 0


def described(x: Tensor, rows: int) -> Any:
    """Tiles of `rows` rows of one head of `x`, which is describable."""
    shape, strides = list(x.shape), list(x.stride())
    if not _allowed(*strides[:3]):
        # What a single entry strides over is never used, but has to be allowed.
        strides[:3] = [stride if size > 1 else shape[3] for size, stride in zip(shape[:3], strides[:3], strict=True)]
    return _descriptor(x, shape, strides, [1, 1, rows, shape[3]], _layout(128, 16, 4))


def described_numbers(x: Tensor, count: int) -> Any:
    """Pieces of `count` float32 of `x`, which is contiguous."""
    return _descriptor(x, [x.numel()], [1], [count], _layout(0, 32, 1))


def described_squares(x: Tensor) -> Any:
    """Squares of ROWS x ROWS of `x`, which is (squares, ROWS, ROWS) and contiguous."""
    return _descriptor(x, list(x.shape), list(x.stride()), [1, ROWS, ROWS], _layout(128, 16, 3))


def _descriptor(base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any) -> Any:
    """A TensorDescriptor without the checks of its constructor, which take longer than the rest of a launch."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base = base
    descriptor.shape = shape
    descriptor.strides = strides
    descriptor.block_shape = block_shape
    descriptor.layout = layout
    return descriptor


@cache
def _layout(swizzle_bytes: int, bits: int, rank: int) -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle_bytes, element_bitwidth=bits, rank=rank)
