"""FlashAttention-3's forward pass for Hopper: copies, matrix products and softmax run at the same time.

One program stays on each multiprocessor and walks over tiles of queries. Its warps have different jobs. One warp
fetches tiles of q, k and v with the copy engine into rings of shared memory; every other group of four warps, a
consumer, owns ROWS queries of the tile, keeps their output in registers and multiplies with asynchronous tensor core
instructions. While the tensor cores multiply one block of weights by v, a consumer computes the next block's weights
(OVERLAP), and consumers may take turns, so that one's softmax runs beside the other's products (TURNS).

Barriers count what is ready: `full` ones complete when the copy engine has delivered a tile, `empty` ones when every
consumer has finished reading it. A stage and the parity of a barrier's phase advance together, see `following`.

Each consumer walks its blocks of keys from the last to the first. Only the last one can cross the diagonal or the end
of the keys, because ROWS <= BLOCK_N are powers of two: it alone is masked, and it has a key for every row, so that no
row's maximum is ever -inf. Tiles are dealt like cards, forwards and then backwards, the longest first: every program
gets the same work to within a block or two without a counter in memory, and runs repeat bit by bit.

The backward pass is that of `attention_kernels`, which needs no more than the LSE.

Source: Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao 2024, "FlashAttention-3", https://arxiv.org/abs/2407.08608.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
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

from .configurations import Configuration, configuration
from .runtime import card, launch

ROWS = 64
"""Queries of one consumer: what a warpgroup's product covers."""
L2_BYTES = 32 << 20
"""Of the cache of 50 MiB, what the keys and values of a section may take."""
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def ceiling(value, divisor):
    return (value + divisor - 1) // divisor


@gluon.jit
def following(stage, parity, STAGES: gl.constexpr):
    """The next stage of a ring, and the parity of its barriers' phase: it flips whenever the ring starts over."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, parity ^ 1, parity)


@gluon.jit
def dealt(deal):
    """The number of the tile that this program gets in a deal: even deals go forwards, odd ones backwards."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    return deal * programs + gl.where(deal % 2 == 0, program, programs - 1 - program)


@gluon.jit
def deals(tiles):
    """How many tiles this program gets. Only in the last deal can there be too few for everyone."""
    count = ceiling(tiles, gl.num_programs(0))
    return gl.where(dealt(count - 1) < tiles, count, count - 1)


@gluon.jit
def located(tile, all_heads, blocks, section, IS_CAUSAL: gl.constexpr):
    """The head (counted over the batch) and the block of queries of a tile.

    Heads come in sections whose keys and values fit the L2 cache together. Within one, all heads have their turn at one
    length, then at the next: falling, in the section before that rising, so that lengths change gradually.
    """
    sections = ceiling(all_heads, section)
    number = tile // (section * blocks)
    within = tile - number * section * blocks
    first = number * section
    members = gl.minimum(section, all_heads - first)
    block = within // members
    head = first + within - block * members
    if IS_CAUSAL:
        block = gl.where((sections - number) % 2 == 1, blocks - 1 - block, block)
    return head, block


@gluon.jit
def opaque(value):
    """`value`, but the compiler computes nothing from it in advance: columns would fill registers all along."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def visited(first_row, keys, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, IS_CAUSAL: gl.constexpr):
    """How many blocks of keys the rows `first_row ... first_row + ROWS` see."""
    end = keys
    if IS_CAUSAL:
        end = gl.minimum(keys, first_row + ROWS)
    return ceiling(end, BLOCK_N)


@gluon.jit
def produce(
    q, k, v, q_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, group, all_heads, queries, keys, section,
    IS_CAUSAL: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Have the copy engine fetch all that the consumers will read, in their order, as soon as there is room."""
    blocks = ceiling(queries, ROWS * CONSUMERS)
    stage = 0
    # Nobody has to empty a ring before its first round: the phase before the first one counts as complete.
    parity = 1
    for deal in range(deals(blocks * all_heads)):
        head, block = located(dealt(deal), all_heads, blocks, section, IS_CAUSAL)
        batch = head // heads
        head = head % heads
        start = block * ROWS * CONSUMERS
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(consumer), (deal & 1) ^ 1)
            mbarrier.expect(q_full.index(consumer), q.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q, [batch, head, start + consumer * ROWS, 0], q_full.index(consumer), q_tiles.index(consumer)
            )
        count = visited(start + (CONSUMERS - 1) * ROWS, keys, ROWS, BLOCK_N, IS_CAUSAL)
        for step in range(count):
            first = (count - 1 - step) * BLOCK_N
            mbarrier.wait(k_empty.index(stage), parity)
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k, [batch, head // group, first, 0], k_full.index(stage), k_ring.index(stage)
            )
            mbarrier.wait(v_empty.index(stage), parity)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v, [batch, head // group, first, 0], v_full.index(stage), v_ring.index(stage)
            )
            stage, parity = following(stage, parity, STAGES)


@gluon.jit
def weighed(scores, peak, total, scale_log2):
    """A step of the online softmax: the weights, the factor for what was summed before, and the new statistics."""
    new_peak = gl.maximum(peak, gl.max(scores, axis=1))
    shift = new_peak * scale_log2
    correction = gl.exp2(peak * scale_log2 - shift)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(shift, 1))
    return weights, correction, new_peak, total * correction + gl.sum(weights, axis=1)


@gluon.jit
def take_turn(turns, turn, CONSUMER: gl.constexpr, TURNS: gl.constexpr):
    """Wait until the consumer before this one has issued its products; the first consumer begins."""
    if TURNS:
        mbarrier.wait(turns.index(CONSUMER), (turn & 1) ^ (1 if CONSUMER == 0 else 0))


@gluon.jit
def pass_turn(turns, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, TURNS: gl.constexpr):
    if TURNS:
        mbarrier.arrive(turns.index((CONSUMER + 1) % CONSUMERS), count=1)


@gluon.jit
def consume(
    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    heads, all_heads, queries, keys, section, scale_log2,
    IS_CAUSAL: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, TURNS: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Attend with ROWS queries of every tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    dtype: gl.constexpr = v_ring.dtype
    no_scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    q_tile = q_tiles.index(CONSUMER).reshape([ROWS, D])
    o_tile = o_tiles.index(CONSUMER)
    blocks = ceiling(queries, ROWS * CONSUMERS)
    stage = 0
    parity = 0
    turn = 0
    for deal in range(deals(blocks * all_heads)):
        head, block = located(dealt(deal), all_heads, blocks, section, IS_CAUSAL)
        start_tile = block * ROWS * CONSUMERS
        start = start_tile + CONSUMER * ROWS
        count = visited(start, keys, ROWS, BLOCK_N, IS_CAUSAL)
        if IS_CAUSAL and ROWS * CONSUMERS > BLOCK_N:
            # Blocks that only a later consumer sees. Waiting first keeps this arrival out of an earlier phase.
            for _ in range(count, visited(start_tile + (CONSUMERS - 1) * ROWS, keys, ROWS, BLOCK_N, IS_CAUSAL)):
                take_turn(turns, turn, CONSUMER, TURNS)
                pass_turn(turns, CONSUMER, CONSUMERS, TURNS)
                turn += 1
                mbarrier.wait(k_full.index(stage), parity)
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.wait(v_full.index(stage), parity)
                mbarrier.arrive(v_empty.index(stage), count=1)
                stage, parity = following(stage, parity, STAGES)

        mbarrier.wait(q_full.index(CONSUMER), deal & 1)
        mbarrier.wait(k_full.index(stage), parity)
        take_turn(turns, turn, CONSUMER, TURNS)
        k_tile = k_ring.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
        scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
        pass_turn(turns, CONSUMER, CONSUMERS, TURNS)
        turn += 1
        scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        rows = start + gl.arange(0, ROWS, layout=ROW)
        columns = opaque((count - 1) * BLOCK_N) + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        end = gl.full([ROWS], 0, gl.int32, ROW) + keys
        if IS_CAUSAL:
            end = gl.minimum(end, rows + 1)
        scores = gl.where(gl.expand_dims(columns, 0) < gl.expand_dims(end, 1), scores, float("-inf"))
        peak = gl.max(scores, axis=1)
        shift = peak * scale_log2
        weights = gl.exp2(scores * scale_log2 - gl.expand_dims(shift, 1))
        total = gl.sum(weights, axis=1)
        p_tile = gl.convert_layout(weights.to(dtype), WEIGHTS)
        output = gl.zeros([ROWS, D], gl.float32, OUTPUT)
        if OVERLAP:
            after, after_parity = following(stage, parity, STAGES)
            mbarrier.wait(k_full.index(after), after_parity, pred=count > 1)

        for step in range(1, count):
            v_stage = stage
            v_parity = parity
            stage, parity = following(stage, parity, STAGES)
            k_tile = k_ring.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
            v_tile = v_ring.index(v_stage).reshape([BLOCK_N, D])
            if not OVERLAP:
                mbarrier.wait(k_full.index(stage), parity)
            take_turn(turns, turn, CONSUMER, TURNS)
            if OVERLAP:
                scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(v_stage), v_parity)
                output = warpgroup_mma(p_tile, v_tile, output, is_async=True)
                pass_turn(turns, CONSUMER, CONSUMERS, TURNS)
                scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
                mbarrier.arrive(k_empty.index(stage), count=1)
                weights, correction, peak, total = weighed(scores, peak, total, scale_log2)
                # Here, so that the compiler leaves the weights before the wait: it doesn't move them over a branch.
                after, after_parity = following(stage, parity, STAGES)
                mbarrier.wait(k_full.index(after), after_parity, pred=step + 1 < count)
                output = warpgroup_mma_wait(num_outstanding=0, deps=[output])
                mbarrier.arrive(v_empty.index(v_stage), count=1)
            else:
                mbarrier.wait(v_full.index(v_stage), v_parity)
                output = warpgroup_mma(p_tile, v_tile, output, is_async=True)
                scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
                pass_turn(turns, CONSUMER, CONSUMERS, TURNS)
                output = warpgroup_mma_wait(num_outstanding=1, deps=[output])
                mbarrier.arrive(v_empty.index(v_stage), count=1)
                scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
                mbarrier.arrive(k_empty.index(stage), count=1)
                weights, correction, peak, total = weighed(scores, peak, total, scale_log2)
            turn += 1
            output = output * gl.expand_dims(gl.convert_layout(correction, OUTPUT_ROW), 1)
            p_tile = gl.convert_layout(weights.to(dtype), WEIGHTS)

        mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        mbarrier.wait(v_full.index(stage), parity)
        output = warpgroup_mma(p_tile, v_ring.index(stage).reshape([BLOCK_N, D]), output, is_async=True)
        log_sum = (peak * scale_log2 + gl.log2(total)) * LN_2
        gl.store(lse + head.to(gl.int64) * queries + rows, log_sum, mask=rows < queries)
        factor = gl.expand_dims(gl.convert_layout(1.0 / total, OUTPUT_ROW), 1)
        output = warpgroup_mma_wait(num_outstanding=0, deps=[output])
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, parity = following(stage, parity, STAGES)
        # The copy engine has read the tile before this one, then this one takes its place.
        tma.store_wait(0)
        o_tile.reshape([ROWS, D]).store((output * factor).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o, [head // heads, head % heads, start, 0], o_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "group", "all_heads", "queries", "keys", "section"])
def attention_hopper_kernel(
    lse, q, k, v, o, heads, group, all_heads, queries, keys, section, scale_log2,
    D: gl.constexpr, IS_CAUSAL: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """q, k, v and o are descriptors of (batch, heads, sequence, D); `lse` is contiguous (batch, heads, queries)."""
    gl.static_assert(ROWS <= BLOCK_N)
    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, ROWS, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    o_tiles = gl.allocate_shared_memory(o.dtype, [CONSUMERS, 1, 1, ROWS, D], o.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(consumer), count=1)
        mbarrier.init(q_empty.index(consumer), count=1)
        mbarrier.init(turns.index(consumer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()

    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (consume, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, ROWS, BLOCK_N, D, CONSUMERS, STAGES, OVERLAP, TURNS, 0,
                )),
                (consume, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, ROWS, BLOCK_N, D, CONSUMERS, STAGES, OVERLAP, TURNS, 1,
                )),
                (produce, (
                    q, k, v, q_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, group, all_heads, queries, keys, section, IS_CAUSAL, ROWS, BLOCK_N, CONSUMERS, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (consume, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, ROWS, BLOCK_N, D, CONSUMERS, STAGES, OVERLAP, TURNS, 0,
                )),
                (consume, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, ROWS, BLOCK_N, D, CONSUMERS, STAGES, OVERLAP, TURNS, 1,
                )),
                (consume, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, ROWS, BLOCK_N, D, CONSUMERS, STAGES, OVERLAP, TURNS, 2,
                )),
                (produce, (
                    q, k, v, q_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, group, all_heads, queries, keys, section, IS_CAUSAL, ROWS, BLOCK_N, CONSUMERS, STAGES,
                )),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip


def serves(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, document_ids: Tensor | None, scale: float) -> bool:
    """Whether `forward` can take these inputs, and is worth its start: q (batch, heads, queries, d) and so on."""
    return (
        mask is None
        and document_ids is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in (64, 128)
        and v.shape[3] == q.shape[3]
        and min(q.shape[2], k.shape[2]) >= 128
        and q.shape[0] * q.shape[1] > 0
        # The largest score has the largest weight: the maximum is taken before the factor.
        and scale > 0.0
        and card(q.device).capability == (9, 0)
        and all(describable(x) for x in (q, k, v))
    )


def forward(q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float) -> None:
    """Fill `output`, as large as q and describable, and the LSE, contiguous (batch, heads, queries)."""
    run = partial(run_configuration, q, k, v, output, lse, is_causal, scale)
    bucket = f"d{q.shape[3]}" + ("_causal" if is_causal else "")
    run(
        configuration(
            "attention_hopper",
            q.device,
            q.dtype,
            bucket,
            lambda _: candidate_configurations(q.shape[3])[0],
            candidates=lambda _: candidate_configurations(q.shape[3]),
            run=run,
        )
    )


def run_configuration(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, is_causal: bool, scale: float, chosen: Configuration
) -> None:
    batch, heads, queries, d = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    tiles = triton.cdiv(queries, ROWS * chosen["CONSUMERS"]) * batch * heads
    section = max(1, L2_BYTES // (2 * keys * d * q.element_size())) * group
    launch(
        attention_hopper_kernel,
        (min(tiles, card(q.device).multiprocessors),),
        lse,
        _described(q, ROWS),
        *(_described(x, chosen["BLOCK_N"]) for x in (k, v)),
        _described(output, ROWS),
        *(heads, group, batch * heads, queries, keys, min(section, batch * heads), scale * math.log2(math.e)),
        **{"D": d, "IS_CAUSAL": is_causal, "ROWS": ROWS},
        **chosen.keywords,
    )


def candidate_configurations(d: int) -> tuple[Configuration, ...]:
    """Every configuration worth timing, the favourite first. The compiler spills none of them."""
    flags = ((True, True), (True, False), (False, True), (False, False))
    if d == 128:
        tiles = [(2, 128, 2, *flag) for flag in flags]
    else:
        tiles = [(3, 128, 2, *flag) for flag in flags] + [(2, 128, 2, *flag) for flag in flags[:2]]
    return tuple(
        Configuration.of(4, 1, CONSUMERS=consumers, BLOCK_N=n, STAGES=stages, OVERLAP=overlap, TURNS=turns)
        for consumers, n, stages, overlap, turns in tiles
    )


def describable(x: Tensor) -> bool:
    """Whether the copy engine can fetch tiles of `x`: starts and rows at multiples of 16 bytes, nothing broadcast."""
    aligned = all(
        size == 1 or (stride > 0 and stride * x.element_size() % 16 == 0)
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    )
    return aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0


def _described(x: Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` rows of one head. A dimension of size 1 may have any stride: it gets one that is allowed."""
    *strides, last = x.stride()
    strides = [x.shape[3] if size == 1 else stride for size, stride in zip(x.shape[:3], strides, strict=True)]
    return TensorDescriptor(
        x, list(x.shape), [*strides, last], [1, 1, rows, x.shape[3]], _layout(rows, x.shape[3], x.dtype)
    )


@cache
def _layout(rows: int, d: int, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(
        [1, 1, rows, d], {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]
    )
