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
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_kernels import LOG2_E, load_tile
from .configurations import Configuration, configuration
from .runtime import Card, launch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
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
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1
        )

    @gluon.jit
    def copy_tile(descriptor, batch, head, row, barrier, buffer):
        tma.async_copy_global_to_shared(descriptor, [batch, head, row, 0], barrier, buffer)

    @gluon.jit
    def matrix(buffer):
        """A (1, 1, rows, features) buffer as (rows, features)."""
        return buffer.reshape([buffer.shape[2], buffer.shape[3]])

    @gluon.jit
    def buffers(COUNT: gl.constexpr, descriptor):
        """COUNT tiles of shared memory, as `descriptor` fills them."""
        shape: gl.constexpr = [COUNT] + descriptor.block_type.shape  # noqa: RUF005
        return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)

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
        head = kv_head * GROUP
        tile = first
        for index in range(GROUP * tiles):
            stage = index % STAGES
            row = tile * BLOCK_M
            statistic = (batch * (gl.num_programs(1) * GROUP) + head) * padded + row
            mbarrier.wait(free.index(stage), (index // STAGES & 1) ^ 1)
            barrier = ready.index(stage)
            mbarrier.expect(barrier, 2 * BLOCK_M * WIDTH * 2 + 2 * BLOCK_M * 4)
            copy_tile(q_descriptor, batch, head, row, barrier, q_ring.index(stage))
            tma.async_copy_global_to_shared(lse_descriptor, [statistic], barrier, lse_ring.index(stage))
            copy_tile(grad_descriptor, batch, head, row, barrier, grad_ring.index(stage))
            tma.async_copy_global_to_shared(delta_descriptor, [statistic], barrier, delta_ring.index(stage))
            tile += 1
            if tile == first + tiles:
                tile = first
                head += 1

    @gluon.jit
    def key_gradient_consumer(
        consumer, k_descriptor, grad_k_descriptor, grad_v_descriptor,
        k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
        start_n, first, tiles, scale, scale_log2,
        GROUP: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, LAG: gl.constexpr,
        FIXED_IN_REGISTERS: gl.constexpr,
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
        total = GROUP * tiles
        zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, scores_layout)
        grad_k = gl.zeros([ROWS, WIDTH], gl.float32, sums_layout)
        grad_v = gl.zeros([ROWS, WIDTH], gl.float32, sums_layout)
        operand = gl.zeros([ROWS, BLOCK_M], dtype, operand_layout)
        k_tile = matrix(k_tiles.index(consumer))
        v_tile = matrix(v_tiles.index(consumer))
        mbarrier.wait(fixed_ready, 0)
        if FIXED_IN_REGISTERS:
            k_tile = k_tile.load(gl.DotOperandLayout(0, scores_layout, 2))
            v_tile = v_tile.load(gl.DotOperandLayout(0, scores_layout, 2))
        tile = first
        for index in range(total):
            stage = index % STAGES
            mbarrier.wait(ready.index(stage), index // STAGES & 1)
            q_tile = matrix(q_ring.index(stage))
            grad_tile = matrix(grad_ring.index(stage))
            scores = warpgroup_mma(k_tile, q_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
            grad_weights = warpgroup_mma(v_tile, grad_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
            if LAG:
                # dK follows one tile behind, so that there are products to run during the exponentials.
                previous = gl.maximum(index - 1, 0) % STAGES
                grad_k = warpgroup_mma(operand, matrix(q_ring.index(previous)), grad_k, is_async=True)
            scores = warpgroup_mma_wait(2 if LAG else 1, deps=[scores])
            lse = lse_ring.index(stage).load(per_query)
            exponents = scores * scale_log2 - lse[None, :]
            if IS_CAUSAL:
                row = tile * BLOCK_M
                if row < first_key + ROWS:
                    rows = row + gl.arange(0, BLOCK_M, per_query)
                    columns = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
                    exponents = gl.where(rows[None, :] >= columns[:, None], exponents, float("-inf"))
            weights = power_of_two(exponents)
            weights_operand = gl.convert_layout(weights.to(dtype), operand_layout)
            grad_v = warpgroup_mma(weights_operand, grad_tile, grad_v, is_async=True)
            delta = delta_ring.index(stage).load(per_query)
            grad_weights = warpgroup_mma_wait(2 if LAG else 1, deps=[grad_weights])
            grad_scores = weights * (grad_weights - delta[None, :])
            if LAG:
                grad_k, grad_v, grad_scores = warpgroup_mma_wait(0, deps=[grad_k, grad_v, grad_scores])
                operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
                mbarrier.arrive(free.index(previous), count=1, pred=index > 0)
            else:
                operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
                grad_k = warpgroup_mma(operand, q_tile, grad_k, is_async=True)
                grad_k, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_v])
                mbarrier.arrive(free.index(stage), count=1)
            tile += 1
            tile = gl.where(tile == first + tiles, first, tile)
        if LAG:  # noqa: SIM102  (what is known when compiling)
            if total > 0:
                last = matrix(q_ring.index((total - 1) % STAGES))
                grad_k = warpgroup_mma(operand, last, grad_k)
        kv_head = gl.program_id(1)
        batch = gl.program_id(2)
        store_matrix(grad_v_descriptor, batch, kv_head, first_key, v_tiles.index(consumer), grad_v)
        store_matrix(grad_k_descriptor, batch, kv_head, first_key, k_tiles.index(consumer), grad_k * scale)
        tma.store_wait(0)

    @gluon.jit(do_not_specialize=["queries", "keys"])
    def attention_key_gradient_hopper(
        grad_k, q_descriptor, k_descriptor, v_descriptor, grad_descriptor, lse_descriptor, delta_descriptor,
        grad_k_descriptor, grad_v_descriptor, queries, keys, padded, scale, scale_log2,
        GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
        LAG: gl.constexpr, FIXED_IN_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
        PRODUCER_REGISTERS: gl.constexpr,
    ):  # fmt: skip
        """One program: dK and dV of CONSUMERS · 64 keys of one key head, summed over the queries of its group."""
        ROWS: gl.constexpr = k_descriptor.block_type.shape[2]
        BLOCK_M: gl.constexpr = q_descriptor.block_type.shape[2]
        start_n = gl.program_id(0) * (CONSUMERS * ROWS)
        kv_head = gl.program_id(1)
        batch = gl.program_id(2)
        first = start_n * 0
        if IS_CAUSAL:
            first = start_n // BLOCK_M
        tiles = gl.maximum(gl.cdiv(queries, BLOCK_M) - first, 0)

        k_tiles = buffers(CONSUMERS, k_descriptor)
        v_tiles = buffers(CONSUMERS, v_descriptor)
        q_ring = buffers(STAGES, q_descriptor)
        grad_ring = buffers(STAGES, grad_descriptor)
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
                    start_n, first, tiles, scale, scale_log2, GROUP, STAGES, IS_CAUSAL, LAG,
                    FIXED_IN_REGISTERS,
                )),
                (key_gradient_consumer, (
                    1, k_descriptor, grad_k_descriptor, grad_v_descriptor,
                    k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
                    start_n, first, tiles, scale, scale_log2, GROUP, STAGES, IS_CAUSAL, LAG,
                    FIXED_IN_REGISTERS,
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

    @gluon.jit
    def query_gradient_producer(
        q_descriptor, grad_descriptor, k_descriptor, v_descriptor, q_tiles, grad_tiles, k_ring, v_ring,
        fixed_ready, ready, free, batch, head, kv_head, start_m, tiles,
        CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    ):  # fmt: skip
        """Fetch Q and grad once, then `tiles` tiles of K and V."""
        ROWS: gl.constexpr = q_tiles.shape[3]
        BLOCK_N: gl.constexpr = k_ring.shape[3]
        WIDTH: gl.constexpr = k_ring.shape[4]
        mbarrier.expect(fixed_ready, 2 * CONSUMERS * ROWS * WIDTH * 2)
        for consumer in gl.static_range(CONSUMERS):
            copy_tile(q_descriptor, batch, head, start_m + consumer * ROWS, fixed_ready, q_tiles.index(consumer))
        for consumer in gl.static_range(CONSUMERS):
            copy_tile(grad_descriptor, batch, head, start_m + consumer * ROWS, fixed_ready, grad_tiles.index(consumer))
        for index in range(tiles):
            stage = index % STAGES
            mbarrier.wait(free.index(stage), (index // STAGES & 1) ^ 1)
            barrier = ready.index(stage)
            mbarrier.expect(barrier, 2 * BLOCK_N * WIDTH * 2)
            copy_tile(k_descriptor, batch, kv_head, index * BLOCK_N, barrier, k_ring.index(stage))
            copy_tile(v_descriptor, batch, kv_head, index * BLOCK_N, barrier, v_ring.index(stage))

    @gluon.jit
    def query_gradient_consumer(
        consumer, q_descriptor, grad_q_descriptor, binary_lse, delta,
        q_tiles, grad_tiles, k_ring, v_ring, fixed_ready, ready, free,
        statistic, start_m, tiles, keys, scale, scale_log2,
        STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, LAG: gl.constexpr, FIXED_IN_REGISTERS: gl.constexpr,
        PIN: gl.constexpr,
    ):  # fmt: skip
        """dQ of the 64 queries of one consumer."""
        ROWS: gl.constexpr = q_tiles.shape[3]
        BLOCK_N: gl.constexpr = k_ring.shape[3]
        WIDTH: gl.constexpr = k_ring.shape[4]
        WARPS: gl.constexpr = gl.num_warps()
        dtype: gl.constexpr = q_descriptor.dtype
        scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
        sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, WIDTH, 16])
        operand_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
        per_query: gl.constexpr = gl.SliceLayout(1, scores_layout)

        first_query = start_m + consumer * ROWS
        rows = first_query + gl.arange(0, ROWS, per_query)
        # The last key that each query sees, and the last that all of them see.
        last_key = gl.zeros_like(rows) + (keys - 1)
        common_key = keys - 1
        if IS_CAUSAL:
            last_key = gl.minimum(last_key, rows)
            common_key = gl.minimum(common_key, first_query)
        lse_rows = gl.load(binary_lse + (statistic + rows))
        delta_rows = gl.load(delta + (statistic + rows))
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, scores_layout)
        grad_q = gl.zeros([ROWS, WIDTH], gl.float32, sums_layout)
        operand = gl.zeros([ROWS, BLOCK_N], dtype, operand_layout)
        q_tile = matrix(q_tiles.index(consumer))
        grad_tile = matrix(grad_tiles.index(consumer))
        mbarrier.wait(fixed_ready, 0)
        if FIXED_IN_REGISTERS:
            q_tile = q_tile.load(gl.DotOperandLayout(0, scores_layout, 2))
            grad_tile = grad_tile.load(gl.DotOperandLayout(0, scores_layout, 2))
        for index in range(tiles):
            stage = index % STAGES
            mbarrier.wait(ready.index(stage), index // STAGES & 1)
            k_tile = matrix(k_ring.index(stage))
            v_tile = matrix(v_ring.index(stage))
            scores = warpgroup_mma(q_tile, k_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
            grad_weights = warpgroup_mma(grad_tile, v_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
            if LAG:
                previous = gl.maximum(index - 1, 0) % STAGES
                grad_q = warpgroup_mma(operand, matrix(k_ring.index(previous)), grad_q, is_async=True)
            scores = warpgroup_mma_wait(2 if LAG else 1, deps=[scores])
            exponents = scores * scale_log2 - lse_rows[:, None]
            if index * BLOCK_N + BLOCK_N - 1 > common_key:
                columns = index * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
                exponents = gl.where(columns[None, :] <= last_key[:, None], exponents, float("-inf"))
            weights = power_of_two(exponents)
            if PIN:
                # The bytes arrived long ago. But the compiler moves nothing across a wait for them, and without one
                # it would put off the exponentials until the products are done.
                mbarrier.wait(ready.index(stage), index // STAGES & 1)
            grad_weights, weights = warpgroup_mma_wait(1 if LAG else 0, deps=[grad_weights, weights])
            grad_scores = weights * (grad_weights - delta_rows[:, None])
            if LAG:
                grad_q, grad_scores = warpgroup_mma_wait(0, deps=[grad_q, grad_scores])
                operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
                mbarrier.arrive(free.index(previous), count=1, pred=index > 0)
            else:
                operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
                grad_q = warpgroup_mma(operand, k_tile, grad_q)
                mbarrier.arrive(free.index(stage), count=1)
        if LAG:
            grad_q = warpgroup_mma(operand, matrix(k_ring.index((tiles - 1) % STAGES)), grad_q)
        head = gl.program_id(1)
        batch = gl.program_id(2)
        store_matrix(grad_q_descriptor, batch, head, first_query, q_tiles.index(consumer), grad_q * scale)
        tma.store_wait(0)

    @gluon.jit(do_not_specialize=["queries", "keys"])
    def attention_query_gradient_hopper(
        binary_lse, delta, q_descriptor, k_descriptor, v_descriptor, grad_descriptor, grad_q_descriptor,
        queries, keys, padded, scale, scale_log2,
        GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
        LAG: gl.constexpr, FIXED_IN_REGISTERS: gl.constexpr, PIN: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
        PRODUCER_REGISTERS: gl.constexpr,
    ):  # fmt: skip
        """One program: dQ of CONSUMERS · 64 queries of one head, summed over all their keys."""
        ROWS: gl.constexpr = q_descriptor.block_type.shape[2]
        BLOCK_N: gl.constexpr = k_descriptor.block_type.shape[2]
        block = gl.program_id(0)
        if IS_CAUSAL:
            # The last queries have the most keys: start them first.
            block = gl.num_programs(0) - 1 - block
        start_m = block * (CONSUMERS * ROWS)
        head = gl.program_id(1)
        batch = gl.program_id(2)
        end = keys
        if IS_CAUSAL:
            end = gl.minimum(keys, start_m + CONSUMERS * ROWS)
        tiles = gl.cdiv(end, BLOCK_N)
        statistic = (batch * gl.num_programs(1) + head) * padded

        q_tiles = buffers(CONSUMERS, q_descriptor)
        grad_tiles = buffers(CONSUMERS, grad_descriptor)
        k_ring = buffers(STAGES, k_descriptor)
        v_ring = buffers(STAGES, v_descriptor)
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
                (query_gradient_consumer, (
                    0, q_descriptor, grad_q_descriptor, binary_lse, delta,
                    q_tiles, grad_tiles, k_ring, v_ring, fixed_ready, ready, free,
                    statistic, start_m, tiles, keys, scale, scale_log2,
                    STAGES, IS_CAUSAL, LAG, FIXED_IN_REGISTERS, PIN,
                )),
                (query_gradient_consumer, (
                    1, q_descriptor, grad_q_descriptor, binary_lse, delta,
                    q_tiles, grad_tiles, k_ring, v_ring, fixed_ready, ready, free,
                    statistic, start_m, tiles, keys, scale, scale_log2,
                    STAGES, IS_CAUSAL, LAG, FIXED_IN_REGISTERS, PIN,
                )),
                (query_gradient_producer, (
                    q_descriptor, grad_descriptor, k_descriptor, v_descriptor, q_tiles, grad_tiles, k_ring, v_ring,
                    fixed_ready, ready, free, batch, head, head // GROUP, start_m, tiles, CONSUMERS, STAGES,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


def serves(q: Tensor, k: Tensor, v: Tensor, grads: tuple[Tensor, ...], card: Card) -> bool:
    """Whether these kernels compute this backward pass: on Hopper, in half precision, without mask or documents.

    `grads` are the gradient that comes in and those that go out. Every one of these tensors is read or written by the
    copy engine; the statistics are addressed in int32.
    """
    if not AVAILABLE or card.capability != (9, 0) or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if q.shape[3] != v.shape[3] or q.shape[3] not in (64, 128) or 0 in (*q.shape, *k.shape):
        return False
    if max(*q.shape[:2], *k.shape[:2]) > 65535 or q.shape[:2].numel() * _padded_length(q.shape[2]) >= 2**31:
        return False
    return all(_describable(x) for x in (q, k, v, *grads) if x.numel())


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
    """Write the gradients that are wanted, of tensors that `serves` has accepted."""
    binary_lse, delta = statistics(grad, output, lse)
    if want_q:

        def run_queries(chosen: Configuration) -> None:
            query_gradient(grad, q, k, v, binary_lse, delta, grad_q, is_causal, scale, chosen)

        run_queries(_choose("attention_query_gradient_hopper", q, is_causal, run_queries))
    if want_kv:

        def run_keys(chosen: Configuration) -> None:
            key_gradient(grad, q, k, v, binary_lse, delta, grad_k, grad_v, is_causal, scale, chosen)

        run_keys(_choose("attention_key_gradient_hopper", q, is_causal, run_keys))


def statistics(grad: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The LSE to the base of 2 and delta, both (batch, heads, queries rounded up to whole tiles)."""
    batch, heads, queries, width = grad.shape
    padded = _padded_length(queries)
    binary_lse, delta = torch.empty((2, batch, heads, padded), dtype=torch.float32, device=lse.device)
    rows = max(16, 8192 // width)
    launch(
        attention_statistics_kernel,
        (padded // rows * batch * heads,),
        *(output, grad, lse, binary_lse, delta, *output.stride()[:3], *grad.stride()[:3], heads, queries, padded),
        D=width,
        BLOCK_M=rows,
        num_warps=4,
        num_stages=1,
    )
    return binary_lse, delta


def query_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    binary_lse: Tensor,
    delta: Tensor,
    grad_q: Tensor,
    is_causal: bool,
    scale: float,
    chosen: Configuration,
) -> None:
    batch, heads, queries, _ = q.shape
    keywords = dict(chosen.keywords)
    tile = keywords.pop("BLOCK_N")
    launch(
        attention_query_gradient_hopper,
        (triton.cdiv(queries, CONSUMERS * CONSUMER_ROWS), heads, batch),
        *(binary_lse, delta),
        *(_described(q, CONSUMER_ROWS), _described(k, tile), _described(v, tile), _described(grad, CONSUMER_ROWS)),
        *(_described(grad_q, CONSUMER_ROWS), queries, k.shape[2], binary_lse.shape[2]),
        *(scale, scale * math.log2(math.e)),
        **_constants(q, k, is_causal),
        **keywords,
    )


def key_gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    binary_lse: Tensor,
    delta: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    is_causal: bool,
    scale: float,
    chosen: Configuration,
) -> None:
    batch, kv_heads, keys, _ = k.shape
    keywords = dict(chosen.keywords)
    tile = keywords.pop("BLOCK_M")
    launch(
        attention_key_gradient_hopper,
        (triton.cdiv(keys, CONSUMERS * CONSUMER_ROWS), kv_heads, batch),
        *(grad_k, _described(q, tile), _described(k, CONSUMER_ROWS), _described(v, CONSUMER_ROWS)),
        *(_described(grad, tile), _described_statistic(binary_lse, tile), _described_statistic(delta, tile)),
        *(_described(grad_k, CONSUMER_ROWS), _described(grad_v, CONSUMER_ROWS), q.shape[2], keys),
        *(binary_lse.shape[2], scale, scale * math.log2(math.e)),
        **_constants(q, k, is_causal),
        **keywords,
    )


def default_configuration(kernel: str, width: int, card: Card) -> Configuration:
    """What is used where no table was measured."""
    return candidate_configurations(kernel, width, card)[0]


def candidate_configurations(kernel: str, width: int, card: Card) -> tuple[Configuration, ...]:
    """Every configuration worth timing, the untimed favourite first."""
    common = ("STAGES", "LAG", "FIXED_IN_REGISTERS")
    names = ("BLOCK_N", *common, "PIN") if kernel == "attention_query_gradient_hopper" else ("BLOCK_M", *common)
    return tuple(
        Configuration.of(num_warps=4, num_stages=1, **dict(zip(names, constants, strict=True)))
        for constants in _CANDIDATES[kernel, width]
    )


_CANDIDATES = {
    ("attention_query_gradient_hopper", 64): (
        (128, 3, False, False, True),
        (128, 4, True, False, True),
        (64, 4, True, True, True),
    ),
    ("attention_query_gradient_hopper", 128): (
        (128, 2, False, False, True),
        (64, 4, True, False, True),
        (64, 3, False, True, True),
    ),
    ("attention_key_gradient_hopper", 64): ((64, 4, True, True), (64, 4, True, False), (64, 3, False, True)),
    ("attention_key_gradient_hopper", 128): ((64, 2, False, False), (64, 3, False, False), (64, 3, True, False)),
}
"""A tile's rows, the buffers of the ring, and switches of the kernel."""


def _choose(kernel: str, q: Tensor, is_causal: bool, run: Callable[[Configuration], None]) -> Configuration:
    width = q.shape[3]
    return configuration(
        kernel,
        q.device,
        q.dtype,
        f"d{width}" + ("_causal" if is_causal else ""),
        partial(default_configuration, kernel, width),
        candidates=partial(candidate_configurations, kernel, width),
        run=run,
    )


def _constants(q: Tensor, k: Tensor, is_causal: bool) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "IS_CAUSAL": is_causal,
        "CONSUMERS": CONSUMERS,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": PRODUCER_REGISTERS,
    }


def _padded_length(queries: int) -> int:
    return triton.cdiv(queries, PADDING) * PADDING


def _describable(x: Tensor) -> bool:
    """Whether the copy engine can address `x`: contiguous rows, and every start a multiple of 16 bytes apart."""
    if x.stride(3) != 1 or x.data_ptr() % 16:
        return False
    outer = zip(x.shape[:3], x.stride()[:3], strict=True)
    return all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in outer)


def _described(x: Tensor, rows: int) -> Any:
    """A descriptor of `x` whose tiles are `rows` rows of one head. What a single entry strides over is never used."""
    strides = [stride if size > 1 else x.shape[3] for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, x.shape[3]], _tile_layout())


def _described_statistic(x: Tensor, rows: int) -> Any:
    return TensorDescriptor(x, [x.numel()], [1], [rows], _row_layout())


@cache
def _tile_layout() -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


@cache
def _row_layout() -> Any:
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
