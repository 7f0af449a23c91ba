"""FlashAttention's backward pass for Hopper, in Gluon: one warp copies, the others multiply, all of it asynchronously.

What `attention_kernels.py` computes with the compiler's own schedule is laid out by hand here, for H100 and H200 alone.
A CTA has one producer warp, which fetches tiles through the copy engine (TMA) into a ring of buffers, and two consumers
of four warps each, which multiply them (wgmma) and own 64 rows of the result each. The warps hand registers over, so
that a consumer has 240 a thread. Two barriers guard each buffer of the ring: `ready` (the bytes have arrived) and
`free` (every consumer has finished reading).

Three launches: `statistics` (a plain Triton kernel) writes each query's log-sum-exp, in powers of two, and its delta,
padded to whole tiles with values that make the probability 0; `query_gradient` walks over the keys and `key_gradient`
over the queries, all heads of a group one after another. Nothing is added atomically: every run gives the same bits.
Scores and their gradients pass from one product to the next in registers. The copy engine fills tiles with zeros
beyond the end and stores nothing there, so that only tiles on the causal diagonal, or with the last keys, are masked.

Source: Shah et al. 2024, "FlashAttention-3", https://arxiv.org/abs/2407.08608.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_kernels import LOG2_E, load_tile
from .runtime import Card, launch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    AVAILABLE = True
except ImportError:
    AVAILABLE = False

CONSUMER_ROWS = 64
CONSUMERS = 2
PADDING = 128
"""Rows of statistics are padded to a multiple of this: the longest tile of queries there is."""
PRODUCER_REGISTERS = 24
CONSUMER_REGISTERS = 240
_NATURAL_TO_BINARY: tl.constexpr = LOG2_E


@triton.jit
def attention_statistics_kernel(
    o, grad, lse, binary_lse, delta, stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm,
    heads, queries, padded,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta[i] = sum over features of o[i] · grad[i], and the LSE to the base of 2, both (batch, heads, padded).

    A query without keys, and every row beyond the last one, gets LSE +inf, hence probability 0, and delta 0.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = padded // BLOCK_M
    batch = program // (blocks * heads)
    head = program // blocks % heads
    start_m = (program % blocks * BLOCK_M).to(tl.int32)
    rows = start_m + tl.arange(0, BLOCK_M)
    inside = rows < queries
    o += batch * stride_ob + head * stride_oh
    grad += batch * stride_gb + head * stride_gh
    output = load_tile(o, stride_om, start_m, queries, D, BLOCK_M, D, True).to(tl.float32)
    gradient = load_tile(grad, stride_gm, start_m, queries, D, BLOCK_M, D, True).to(tl.float32)
    sums = tl.sum(output * gradient, axis=1)
    natural = tl.load(lse + (batch * heads + head) * queries + rows, mask=inside, other=float("-inf"))
    written = (batch * heads + head) * padded + rows
    tl.store(delta + written, tl.where(inside, sums, 0.0))
    tl.store(binary_lse + written, tl.where(natural == float("-inf"), float("inf"), natural * LOG2_E))


if AVAILABLE:

    @gluon.jit
    def power_of_two(x):
        """2 to the power of `x` by the special function unit alone; denormal results are 0."""
        return gl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
        )

    @gluon.jit
    def copy_tile(descriptor, batch, head, row, barrier, buffer):
        tma.async_copy_global_to_shared(descriptor, [batch, head, row, 0], barrier, buffer)

    @gluon.jit
    def matrix(buffer):
        """A (1, 1, rows, features) buffer as (rows, features)."""
        return buffer.reshape([buffer.shape[2], buffer.shape[3]])

    @gluon.jit
    def store_matrix(descriptor, batch, head, row, buffer, value):
        """Write `value` through `buffer`, which nothing reads any more; rows beyond the end are dropped."""
        matrix(buffer).store(value.to(descriptor.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(descriptor, [batch, head, row, 0], buffer)

    @gluon.jit
    def key_gradient_producer(
        q_descriptor, grad_descriptor, k_descriptor, v_descriptor, lse_descriptor, delta_descriptor,
        k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
        batch, kv_head, start_n, first, tiles, padded,
        GROUP: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """Fetch K and V once, then Q, grad and the statistics of `tiles` tiles of every head of the group."""
        ROWS: gl.constexpr = k_tiles.shape[3]
        BLOCK_M: gl.constexpr = q_ring.shape[3]
        WIDTH: gl.constexpr = q_ring.shape[4]
        mbarrier.expect(fixed_ready, 2 * CONSUMERS * ROWS * WIDTH * 2)
        for consumer in gl.static_range(CONSUMERS):
            copy_tile(k_descriptor, batch, kv_head, start_n + consumer * ROWS, fixed_ready, k_tiles.index(consumer))
        for consumer in gl.static_range(CONSUMERS):
            copy_tile(v_descriptor, batch, kv_head, start_n + consumer * ROWS, fixed_ready, v_tiles.index(consumer))
        for index in range(GROUP * tiles):
            stage = index % STAGES
            head = kv_head * GROUP + index // tiles
            row = (first + index % tiles) * BLOCK_M
            statistic = (batch * (gl.num_programs(1) * GROUP) + head) * padded + row
            mbarrier.wait(free.index(stage), (index // STAGES & 1) ^ 1)
            barrier = ready.index(stage)
            mbarrier.expect(barrier, 2 * BLOCK_M * WIDTH * 2 + 2 * BLOCK_M * 4)
            copy_tile(q_descriptor, batch, head, row, barrier, q_ring.index(stage))
            tma.async_copy_global_to_shared(lse_descriptor, [statistic], barrier, lse_ring.index(stage))
            copy_tile(grad_descriptor, batch, head, row, barrier, grad_ring.index(stage))
            tma.async_copy_global_to_shared(delta_descriptor, [statistic], barrier, delta_ring.index(stage))

    @gluon.jit
    def key_gradient_consumer(
        consumer, k_descriptor, grad_k_descriptor, grad_v_descriptor,
        k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
        batch, kv_head, start_n, first, tiles, scale, scale_log2,
        GROUP: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, OVERLAP: gl.constexpr,
    ):  # fmt: skip
        """dK and dV of the 64 keys of one consumer. Scores are (keys, queries) here."""
        ROWS: gl.constexpr = k_tiles.shape[3]
        BLOCK_M: gl.constexpr = q_ring.shape[3]
        WIDTH: gl.constexpr = q_ring.shape[4]
        WARPS: gl.constexpr = gl.num_warps()
        dtype: gl.constexpr = k_descriptor.dtype
        scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
        sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
        operand_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
        per_query: gl.constexpr = gl.SliceLayout(0, scores_layout)

        first_key = start_n + consumer * ROWS
        k_tile = matrix(k_tiles.index(consumer))
        v_tile = matrix(v_tiles.index(consumer))
        zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, scores_layout)
        grad_k = gl.zeros([ROWS, WIDTH], gl.float32, sums_layout)
        grad_v = gl.zeros([ROWS, WIDTH], gl.float32, sums_layout)
        if OVERLAP:
            grad_k = warpgroup_mma_init(grad_k)
            grad_v = warpgroup_mma_init(grad_v)
        mbarrier.wait(fixed_ready, 0)
        for index in range(GROUP * tiles):
            stage = index % STAGES
            mbarrier.wait(ready.index(stage), index // STAGES & 1)
            q_tile = matrix(q_ring.index(stage))
            grad_tile = matrix(grad_ring.index(stage))
            scores = warpgroup_mma(k_tile, q_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
            grad_weights = warpgroup_mma(v_tile, grad_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
            if OVERLAP:
                # The scores are there, and so are the sums of the previous tile, which were asked for earlier.
                scores, grad_k, grad_v = warpgroup_mma_wait(1, deps=[scores, grad_k, grad_v])
                mbarrier.arrive(free.index((index + STAGES - 1) % STAGES), count=1, pred=index > 0)
            else:
                scores = warpgroup_mma_wait(1, deps=[scores])
            lse = lse_ring.index(stage).load(per_query)
            exponents = scores * scale_log2 - lse[None, :]
            if IS_CAUSAL:
                row = (first + index % tiles) * BLOCK_M
                if row < first_key + ROWS:
                    rows = row + gl.arange(0, BLOCK_M, per_query)
                    columns = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
                    exponents = gl.where(rows[None, :] >= columns[:, None], exponents, float("-inf"))
            weights = power_of_two(exponents)
            operand = gl.convert_layout(weights.to(dtype), operand_layout)
            grad_v = warpgroup_mma(operand, grad_tile, grad_v, is_async=True)
            delta = delta_ring.index(stage).load(per_query)
            grad_weights = warpgroup_mma_wait(1, deps=[grad_weights])
            grad_scores = weights * (grad_weights - delta[None, :])
            operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
            grad_k = warpgroup_mma(operand, q_tile, grad_k, is_async=True)
            if not OVERLAP:
                grad_k, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_v])
                mbarrier.arrive(free.index(stage), count=1)
        if OVERLAP:
            grad_k, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_v])
        store_matrix(grad_v_descriptor, batch, kv_head, first_key, v_tiles.index(consumer), grad_v)
        store_matrix(grad_k_descriptor, batch, kv_head, first_key, k_tiles.index(consumer), grad_k * scale)
        tma.store_wait(0)

    @gluon.jit
    def attention_key_gradient_hopper(
        grad_k_pointer, q_descriptor, k_descriptor, v_descriptor, grad_descriptor, lse_descriptor, delta_descriptor,
        grad_k_descriptor, grad_v_descriptor, queries, keys, padded, scale, scale_log2,
        GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
        OVERLAP: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    ):  # fmt: skip
        """One program: dK and dV of CONSUMERS · 64 keys of one key head, summed over the queries of its group."""
        ROWS: gl.constexpr = k_descriptor.block_type.shape[2]
        BLOCK_M: gl.constexpr = q_descriptor.block_type.shape[2]
        dtype: gl.constexpr = q_descriptor.dtype
        start_n = gl.program_id(0) * (CONSUMERS * ROWS)
        kv_head = gl.program_id(1)
        batch = gl.program_id(2)
        first = start_n * 0
        if IS_CAUSAL:
            first = start_n // BLOCK_M
        tiles = gl.maximum(gl.cdiv(queries, BLOCK_M) - first, 0)

        k_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS] + k_descriptor.block_type.shape, k_descriptor.layout)
        v_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS] + v_descriptor.block_type.shape, v_descriptor.layout)
        q_ring = gl.allocate_shared_memory(dtype, [STAGES] + q_descriptor.block_type.shape, q_descriptor.layout)
        grad_ring = gl.allocate_shared_memory(dtype, [STAGES] + grad_descriptor.block_type.shape, grad_descriptor.layout)
        lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_descriptor.layout)
        delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_descriptor.layout)
        fixed_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        mbarrier.init(fixed_ready, count=1)
        for stage in gl.static_range(STAGES):
            mbarrier.init(ready.index(stage), count=1)
            mbarrier.init(free.index(stage), count=CONSUMERS)
        fence_async_shared()

        gl.warp_specialize(
            [
                (key_gradient_consumer, (
                    0, k_descriptor, grad_k_descriptor, grad_v_descriptor,
                    k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
                    batch, kv_head, start_n, first, tiles, scale, scale_log2, GROUP, STAGES, IS_CAUSAL, OVERLAP,
                )),
                (key_gradient_consumer, (
                    1, k_descriptor, grad_k_descriptor, grad_v_descriptor,
                    k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
                    batch, kv_head, start_n, first, tiles, scale, scale_log2, GROUP, STAGES, IS_CAUSAL, OVERLAP,
                )),
                (key_gradient_producer, (
                    q_descriptor, grad_descriptor, k_descriptor, v_descriptor, lse_descriptor, delta_descriptor,
                    k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
                    batch, kv_head, start_n, first, tiles, padded, GROUP, CONSUMERS, STAGES,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
