"""FlashAttention-3's forward pass and the backward pass to match, for Hopper, written in Gluon.

What `attention_kernels` leaves to the compiler's schedule is laid out by hand here: copies, matrix products and softmax
run at the same time. Warps have different jobs. One warp, the producer, fetches tiles with the copy engine (TMA) into
rings of shared memory. Every other group of four warps, a consumer, owns ROWS rows of the result, keeps their sums in
registers and multiplies with asynchronous tensor core instructions (wgmma). The producer hands registers over. There
are several consumers, and one's exponentials run beside the other's products. Scores and their gradients pass from one
product to the next in registers.

Barriers count what is ready: `full` and `ready` ones complete when the copy engine has delivered a tile, `empty` and
`free` ones when every consumer has finished reading it.

The forward pass. One program stays on each multiprocessor and walks over tiles of queries. A stage and the parity of a
barrier's phase advance together, see `following`. Each consumer walks its blocks of keys from the last to the first.
Only the last one can cross the diagonal or the end of the keys, because ROWS <= BLOCK_N are powers of two: it alone is
masked, and it has a key for every row, so that no row's maximum is ever -inf. Tiles are dealt like cards, forwards and
then backwards, the longest first: every program gets the same work to within a block or two without a counter in
memory, and runs repeat bit by bit. FlashAttention-3's turns between consumers, and its overlap of a consumer's softmax
with its own products, gained nothing on an H200: the consumers fall out of step by themselves.

The backward pass has three launches. `attention_statistics_kernel` (plain Triton) writes each query's log-sum-exp, in
powers of two, and its delta, padded to whole tiles with values that make the probability 0. The kernel of dK and dV
walks over the queries, all heads of a group one after another. The kernel of dQ walks over the keys: it computes the
scores and their gradients once more (seven products in all), or, where there is room for them, reads the gradients
that the other kernel has saved (five products). Programs are ordered like the forward pass's tiles, so that none is
left with a long one at the end. Nothing is added atomically: every run gives the same bits. The copy engine fills tiles
with zeros beyond the end and stores nothing there, so that only tiles on the causal diagonal, or with the last keys,
are masked. With LAG the last product of a tile runs beside the first ones of the next, so that there are products to
run during the exponentials; it costs registers.

The copy engine and these kernels count rows in int32. Importing this file needs a Triton that has Gluon.

Source: Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao 2024, "FlashAttention-3", https://arxiv.org/abs/2407.08608.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_kernels import LOG2_E, load_tile

LN_2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)
"""Rows of one consumer: what a warpgroup's product covers."""
BACKWARD_CONSUMERS = gl.constexpr(2)
SAVED_CONSUMERS = gl.constexpr(4)


@gluon.jit
def power_of_two(x):
    """2 to the power of `x` by the special function unit alone; denormal results are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def copy_tile(descriptor, batch, head, row, barrier, buffer):
    tma.async_copy_global_to_shared(descriptor, [batch, head, row, 0], barrier, buffer)


@gluon.jit
def matrix(buffer):
    """A (1, 1, rows, features) buffer as (rows, features)."""
    return buffer.reshape([buffer.shape[2], buffer.shape[3]])


@gluon.jit
def square(buffer):
    """A (1, rows, columns) buffer as (rows, columns)."""
    return buffer.reshape([buffer.shape[1], buffer.shape[2]])


@gluon.jit
def buffers(COUNT: gl.constexpr, descriptor):
    """COUNT tiles of shared memory, as `descriptor` fills them."""
    shape: gl.constexpr = [COUNT] + descriptor.block_type.shape  # noqa: RUF005
    return gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)


@gluon.jit
def barriers(COUNT: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())


@gluon.jit
def store_matrix(descriptor, batch, head, row, buffer, value):
    """Write `value` through `buffer`, which nothing reads any more; rows beyond the end are dropped."""
    matrix(buffer).store(value.to(descriptor.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(descriptor, [batch, head, row, 0], buffer)


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
    count = gl.cdiv(tiles, gl.num_programs(0))
    return gl.where(dealt(count - 1) < tiles, count, count - 1)


@gluon.jit
def located(tile, all_heads, blocks, section):
    """The head (counted over the batch) of a tile, and the rank of its block: with a causal mask 0 is the longest one.

    Heads come in sections, so that what they read fits the L2 cache together. Within one, all heads have their turn at
    one rank, then at the next: rising, in the section before that falling, so that lengths change gradually, and the
    last tiles of all are the shortest ones.
    """
    sections = gl.cdiv(all_heads, section)
    number = tile // (section * blocks)
    within = tile - number * section * blocks
    first = number * section
    members = gl.minimum(section, all_heads - first)
    rank = within // members
    head = first + within - rank * members
    return head, gl.where((sections - number) % 2 == 1, rank, blocks - 1 - rank)


@gluon.jit
def opaque(value):
    """`value`, but the compiler computes nothing from it in advance: columns would fill registers all along."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def visited(first_row, keys, BLOCK_N: gl.constexpr, IS_CAUSAL: gl.constexpr):
    """How many blocks of keys the rows `first_row ... first_row + ROWS` see."""
    end = keys
    if IS_CAUSAL:
        end = gl.minimum(keys, first_row + ROWS)
    return gl.cdiv(end, BLOCK_N)


@gluon.jit
def forward_producer(
    q, k, v, q_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, group, all_heads, queries, keys, section,
    IS_CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Have the copy engine fetch all that the consumers will read, in their order, as soon as there is room."""
    blocks = gl.cdiv(queries, ROWS * CONSUMERS)
    stage = 0
    # Nobody has to empty a ring before its first round: the phase before the first one counts as complete.
    parity = 1
    for deal in range(deals(blocks * all_heads)):
        head, rank = located(dealt(deal), all_heads, blocks, section)
        batch = head // heads
        head = head % heads
        start = (blocks - 1 - rank) * ROWS * CONSUMERS
        for consumer in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(consumer), (deal & 1) ^ 1)
            mbarrier.expect(q_full.index(consumer), q.block_type.nbytes)
            copy_tile(q, batch, head, start + consumer * ROWS, q_full.index(consumer), q_tiles.index(consumer))
        count = visited(start + (CONSUMERS - 1) * ROWS, keys, BLOCK_N, IS_CAUSAL)
        for step in range(count):
            first = (count - 1 - step) * BLOCK_N
            mbarrier.wait(k_empty.index(stage), parity)
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
            copy_tile(k, batch, head // group, first, k_full.index(stage), k_ring.index(stage))
            mbarrier.wait(v_empty.index(stage), parity)
            mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
            copy_tile(v, batch, head // group, first, v_full.index(stage), v_ring.index(stage))
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
def forward_consumer(
    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    heads, all_heads, queries, keys, section, scale_log2,
    IS_CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER: gl.constexpr,
):  # fmt: skip
    """Attend with ROWS queries of every tile."""
    D: gl.constexpr = q_tiles.shape[4]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUTPUT, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    dtype: gl.constexpr = v_ring.dtype
    no_scores = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    q_tile = matrix(q_tiles.index(CONSUMER))
    blocks = gl.cdiv(queries, ROWS * CONSUMERS)
    stage = 0
    parity = 0
    for deal in range(deals(blocks * all_heads)):
        head, rank = located(dealt(deal), all_heads, blocks, section)
        start_tile = (blocks - 1 - rank) * ROWS * CONSUMERS
        start = start_tile + CONSUMER * ROWS
        count = visited(start, keys, BLOCK_N, IS_CAUSAL)
        if IS_CAUSAL and ROWS * CONSUMERS > BLOCK_N:
            # Blocks that only a later consumer sees. Waiting first keeps this arrival out of an earlier phase.
            for _ in range(count, visited(start_tile + (CONSUMERS - 1) * ROWS, keys, BLOCK_N, IS_CAUSAL)):
                mbarrier.wait(k_full.index(stage), parity)
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.wait(v_full.index(stage), parity)
                mbarrier.arrive(v_empty.index(stage), count=1)
                stage, parity = following(stage, parity, STAGES)

        mbarrier.wait(q_full.index(CONSUMER), deal & 1)
        mbarrier.wait(k_full.index(stage), parity)
        k_tile = matrix(k_ring.index(stage)).permute([1, 0])
        scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
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

        for _ in range(1, count):
            v_stage = stage
            v_parity = parity
            stage, parity = following(stage, parity, STAGES)
            k_tile = matrix(k_ring.index(stage)).permute([1, 0])
            v_tile = matrix(v_ring.index(v_stage))
            mbarrier.wait(k_full.index(stage), parity)
            mbarrier.wait(v_full.index(v_stage), v_parity)
            output = warpgroup_mma(p_tile, v_tile, output, is_async=True)
            scores = warpgroup_mma(q_tile, k_tile, no_scores, use_acc=False, is_async=True)
            output = warpgroup_mma_wait(num_outstanding=1, deps=[output])
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            scores = warpgroup_mma_wait(num_outstanding=0, deps=[scores])
            mbarrier.arrive(k_empty.index(stage), count=1)
            weights, correction, peak, total = weighed(scores, peak, total, scale_log2)
            output = output * gl.expand_dims(gl.convert_layout(correction, OUTPUT_ROW), 1)
            p_tile = gl.convert_layout(weights.to(dtype), WEIGHTS)

        mbarrier.arrive(q_empty.index(CONSUMER), count=1)
        mbarrier.wait(v_full.index(stage), parity)
        output = warpgroup_mma(p_tile, matrix(v_ring.index(stage)), output, is_async=True)
        log_sum = (peak * scale_log2 + gl.log2(total)) * LN_2
        gl.store(lse + head.to(gl.int64) * queries + rows, log_sum, mask=rows < queries)
        factor = gl.expand_dims(gl.convert_layout(1.0 / total, OUTPUT_ROW), 1)
        output = warpgroup_mma_wait(num_outstanding=0, deps=[output])
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, parity = following(stage, parity, STAGES)
        # The copy engine has read the tile before this one, then this one takes its place.
        tma.store_wait(0)
        store_matrix(o, head // heads, head % heads, start, o_tiles.index(CONSUMER), output * factor)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "group", "all_heads", "queries", "keys", "section"])
def attention_forward_hopper_kernel(
    lse, q, k, v, o, heads, group, all_heads, queries, keys, section, scale_log2,
    IS_CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q, k, v and o are descriptors of (batch, heads, sequence, D); `lse` is contiguous (batch, heads, queries)."""
    gl.static_assert(ROWS <= BLOCK_N)
    q_tiles = buffers(CONSUMERS, q)
    k_ring = buffers(STAGES, k)
    v_ring = buffers(STAGES, v)
    o_tiles = buffers(CONSUMERS, o)
    q_full = barriers(CONSUMERS)
    q_empty = barriers(CONSUMERS)
    k_full = barriers(STAGES)
    k_empty = barriers(STAGES)
    v_full = barriers(STAGES)
    v_empty = barriers(STAGES)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(consumer), count=1)
        mbarrier.init(q_empty.index(consumer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)
    fence_async_shared()

    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (forward_consumer, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, BLOCK_N, CONSUMERS, STAGES, 0,
                )),
                (forward_consumer, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, BLOCK_N, CONSUMERS, STAGES, 1,
                )),
                (forward_producer, (
                    q, k, v, q_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, group, all_heads, queries, keys, section, IS_CAUSAL, BLOCK_N, CONSUMERS, STAGES,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (forward_consumer, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, BLOCK_N, CONSUMERS, STAGES, 0,
                )),
                (forward_consumer, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, BLOCK_N, CONSUMERS, STAGES, 1,
                )),
                (forward_consumer, (
                    lse, o, q_tiles, k_ring, v_ring, o_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, all_heads, queries, keys, section, scale_log2,
                    IS_CAUSAL, BLOCK_N, CONSUMERS, STAGES, 2,
                )),
                (forward_producer, (
                    q, k, v, q_tiles, k_ring, v_ring, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    heads, group, all_heads, queries, keys, section, IS_CAUSAL, BLOCK_N, CONSUMERS, STAGES,
                )),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )  # fmt: skip


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


@gluon.jit
def saved_place(query_tile, key_tile, query_tiles, IS_CAUSAL: gl.constexpr):
    """Where a head's (64 keys, 64 queries) are among its tiles: key by key, without those that the mask empties."""
    place = key_tile * query_tiles + query_tile
    if IS_CAUSAL:
        place -= key_tile * (key_tile + 1) // 2
    return place


@gluon.jit
def key_gradient_producer(
    q_descriptor, grad_descriptor, k_descriptor, v_descriptor, lse_descriptor, delta_descriptor,
    k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
    batch, kv_heads, kv_head, start_n, first, tiles, padded, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch K and V once, then Q, grad and the statistics of `tiles` tiles of every head of the group."""
    BLOCK_M: gl.constexpr = q_ring.shape[3]
    WIDTH: gl.constexpr = q_ring.shape[4]
    mbarrier.expect(fixed_ready, 2 * BACKWARD_CONSUMERS * ROWS * WIDTH * 2)
    for consumer in gl.static_range(BACKWARD_CONSUMERS):
        copy_tile(k_descriptor, batch, kv_head, start_n + consumer * ROWS, fixed_ready, k_tiles.index(consumer))
    for consumer in gl.static_range(BACKWARD_CONSUMERS):
        copy_tile(v_descriptor, batch, kv_head, start_n + consumer * ROWS, fixed_ready, v_tiles.index(consumer))
    head = kv_head * GROUP
    tile = first
    for index in range(GROUP * tiles):
        stage = index % STAGES
        row = tile * BLOCK_M
        statistic = (batch * kv_heads * GROUP + head) * padded + row
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
    consumer, k_descriptor, grad_k_descriptor, grad_v_descriptor, saved_descriptor,
    k_tiles, v_tiles, saved_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
    batch, kv_head, member, start_n, first, tiles, query_tiles, keys, tiles_of_head, scale, scale_log2,
    GROUP: gl.constexpr, STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, LAG: gl.constexpr, SAVES: gl.constexpr,
):  # fmt: skip
    """dK and dV of the 64 keys of one consumer. Scores are (keys, queries) here.

    With SAVES the gradients of the scores are kept for `attention_saved_query_gradient_hopper_kernel`.
    """
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
    if SAVES:
        gl.static_assert(BLOCK_M == ROWS)
        operand = square(saved_tiles.index(2 * consumer + 1))
        operand.store(gl.zeros([ROWS, ROWS], dtype, scores_layout))
        fence_async_shared()
    k_tile = matrix(k_tiles.index(consumer))
    v_tile = matrix(v_tiles.index(consumer))
    mbarrier.wait(fixed_ready, 0)
    tile = first
    place = member * GROUP * tiles_of_head + saved_place(first, first_key // ROWS, query_tiles, IS_CAUSAL)
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
        columns = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
        if IS_CAUSAL:
            row = tile * BLOCK_M
            if row < first_key + ROWS:
                rows = row + gl.arange(0, BLOCK_M, per_query)
                exponents = gl.where(rows[None, :] >= columns[:, None], exponents, float("-inf"))
        if SAVES:  # noqa: SIM102  (what is known when compiling)
            # Beyond the last key only what is saved is read on.
            if first_key + ROWS > keys:
                exponents = gl.where((columns < keys)[:, None], exponents, float("-inf"))
        weights = power_of_two(exponents)
        weights_operand = gl.convert_layout(weights.to(dtype), operand_layout)
        grad_v = warpgroup_mma(weights_operand, grad_tile, grad_v, is_async=True)
        delta = delta_ring.index(stage).load(per_query)
        grad_weights = warpgroup_mma_wait(2 if LAG else 1, deps=[grad_weights])
        grad_scores = weights * (grad_weights - delta[None, :])
        if LAG:
            grad_k, grad_v, grad_scores = warpgroup_mma_wait(0, deps=[grad_k, grad_v, grad_scores])
            mbarrier.arrive(free.index(previous), count=1, pred=index > 0)
        if SAVES:
            # The copy engine has read the tile before the last one.
            tma.store_wait(1)
            saved_tile = saved_tiles.index(2 * consumer + index % 2)
            operand = square(saved_tile)
            operand.store(grad_scores.to(dtype))
            fence_async_shared()
            # A tile of keys beyond the end, or that the mask empties, has no place.
            kept = first_key < keys
            if IS_CAUSAL:
                kept &= tile * ROWS >= first_key
            if kept:
                tma.async_copy_shared_to_global(saved_descriptor, [place, 0, 0], saved_tile)
            else:
                # The next tile's wait would count one copy too few.
                tma.store_wait(0)
        else:
            operand = gl.convert_layout(grad_scores.to(dtype), operand_layout)
        if not LAG:
            grad_k = warpgroup_mma(operand, q_tile, grad_k, is_async=True)
            grad_k, grad_v = warpgroup_mma_wait(0, deps=[grad_k, grad_v])
            mbarrier.arrive(free.index(stage), count=1)
        tile += 1
        place += 1
        if GROUP > 1:  # noqa: SIM102  (what is known when compiling)
            if tile == first + tiles:
                tile = first
                place += tiles_of_head - tiles
    if LAG:  # noqa: SIM102  (what is known when compiling)
        if total > 0:
            last = matrix(q_ring.index((total - 1) % STAGES))
            grad_k = warpgroup_mma(operand, last, grad_k)
    store_matrix(grad_v_descriptor, batch, kv_head, first_key, v_tiles.index(consumer), grad_v)
    store_matrix(grad_k_descriptor, batch, kv_head, first_key, k_tiles.index(consumer), grad_k * scale)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["kv_heads", "first_head", "all_heads", "section", "queries", "keys", "tiles_of_head"])
def attention_key_gradient_hopper_kernel(
    grad_k, q_descriptor, k_descriptor, v_descriptor, grad_descriptor, lse_descriptor, delta_descriptor,
    grad_k_descriptor, grad_v_descriptor, saved_descriptor,
    kv_heads, first_head, all_heads, section, queries, keys, padded, tiles_of_head, scale, scale_log2,
    GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
    SAVES: gl.constexpr,
):  # fmt: skip
    """One program: dK and dV of 128 keys of one key head, summed over the queries of its group.

    The key heads `first_head ... first_head + all_heads` have their turn, counted over the batch.
    """
    blocks = gl.cdiv(keys, BACKWARD_CONSUMERS * ROWS)
    member, block = located(gl.program_id(0), all_heads, blocks, section)
    start_n = block * (BACKWARD_CONSUMERS * ROWS)
    batch = (first_head + member) // kv_heads
    kv_head = (first_head + member) % kv_heads
    first = start_n * 0
    if IS_CAUSAL:
        first = start_n // BLOCK_M
    query_tiles = gl.cdiv(queries, BLOCK_M)
    tiles = gl.maximum(query_tiles - first, 0)

    k_tiles = buffers(BACKWARD_CONSUMERS, k_descriptor)
    v_tiles = buffers(BACKWARD_CONSUMERS, v_descriptor)
    saved_tiles = k_tiles
    if SAVES:
        saved_tiles = buffers(2 * BACKWARD_CONSUMERS, saved_descriptor)
    q_ring = buffers(STAGES, q_descriptor)
    grad_ring = buffers(STAGES, grad_descriptor)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], lse_descriptor.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], delta_descriptor.layout)
    fixed_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = barriers(STAGES)
    free = barriers(STAGES)
    mbarrier.init(fixed_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=BACKWARD_CONSUMERS)
    fence_async_shared()

    gl.warp_specialize(
        [
            (key_gradient_consumer, (
                0, k_descriptor, grad_k_descriptor, grad_v_descriptor, saved_descriptor,
                k_tiles, v_tiles, saved_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
                batch, kv_head, member, start_n, first, tiles, query_tiles, keys, tiles_of_head, scale, scale_log2,
                GROUP, STAGES, IS_CAUSAL, LAG, SAVES,
            )),
            (key_gradient_consumer, (
                1, k_descriptor, grad_k_descriptor, grad_v_descriptor, saved_descriptor,
                k_tiles, v_tiles, saved_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
                batch, kv_head, member, start_n, first, tiles, query_tiles, keys, tiles_of_head, scale, scale_log2,
                GROUP, STAGES, IS_CAUSAL, LAG, SAVES,
            )),
            (key_gradient_producer, (
                q_descriptor, grad_descriptor, k_descriptor, v_descriptor, lse_descriptor, delta_descriptor,
                k_tiles, v_tiles, q_ring, grad_ring, lse_ring, delta_ring, fixed_ready, ready, free,
                batch, kv_heads, kv_head, start_n, first, tiles, padded, GROUP, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def query_gradient_producer(
    q_descriptor, grad_descriptor, k_descriptor, v_descriptor, q_tiles, grad_tiles, k_ring, v_ring,
    fixed_ready, ready, free, batch, head, kv_head, start_m, tiles, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch Q and grad once, then `tiles` tiles of K and V."""
    BLOCK_N: gl.constexpr = k_ring.shape[3]
    WIDTH: gl.constexpr = k_ring.shape[4]
    mbarrier.expect(fixed_ready, 2 * BACKWARD_CONSUMERS * ROWS * WIDTH * 2)
    for consumer in gl.static_range(BACKWARD_CONSUMERS):
        copy_tile(q_descriptor, batch, head, start_m + consumer * ROWS, fixed_ready, q_tiles.index(consumer))
    for consumer in gl.static_range(BACKWARD_CONSUMERS):
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
    batch, head, statistic, start_m, tiles, keys, scale, scale_log2,
    STAGES: gl.constexpr, IS_CAUSAL: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """dQ of the 64 queries of one consumer."""
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
        # The bytes arrived long ago. But the compiler moves nothing across a wait for them, and without one it would
        # put off the exponentials until the products are done.
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
    store_matrix(grad_q_descriptor, batch, head, first_query, q_tiles.index(consumer), grad_q * scale)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "all_heads", "section", "queries", "keys"])
def attention_query_gradient_hopper_kernel(
    binary_lse, delta, q_descriptor, k_descriptor, v_descriptor, grad_descriptor, grad_q_descriptor,
    heads, all_heads, section, queries, keys, padded, scale, scale_log2,
    GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
):  # fmt: skip
    """One program: dQ of 128 queries of one head, summed over all their keys."""
    blocks = gl.cdiv(queries, BACKWARD_CONSUMERS * ROWS)
    place, rank = located(gl.program_id(0), all_heads, blocks, section)
    start_m = (blocks - 1 - rank) * (BACKWARD_CONSUMERS * ROWS)
    batch = place // heads
    head = place % heads
    end = keys
    if IS_CAUSAL:
        end = gl.minimum(keys, start_m + BACKWARD_CONSUMERS * ROWS)
    tiles = gl.cdiv(end, BLOCK_N)
    statistic = place * padded

    q_tiles = buffers(BACKWARD_CONSUMERS, q_descriptor)
    grad_tiles = buffers(BACKWARD_CONSUMERS, grad_descriptor)
    k_ring = buffers(STAGES, k_descriptor)
    v_ring = buffers(STAGES, v_descriptor)
    fixed_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ready = barriers(STAGES)
    free = barriers(STAGES)
    mbarrier.init(fixed_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=BACKWARD_CONSUMERS)
    fence_async_shared()

    gl.warp_specialize(
        [
            (query_gradient_consumer, (
                0, q_descriptor, grad_q_descriptor, binary_lse, delta,
                q_tiles, grad_tiles, k_ring, v_ring, fixed_ready, ready, free,
                batch, head, statistic, start_m, tiles, keys, scale, scale_log2, STAGES, IS_CAUSAL, LAG,
            )),
            (query_gradient_consumer, (
                1, q_descriptor, grad_q_descriptor, binary_lse, delta,
                q_tiles, grad_tiles, k_ring, v_ring, fixed_ready, ready, free,
                batch, head, statistic, start_m, tiles, keys, scale, scale_log2, STAGES, IS_CAUSAL, LAG,
            )),
            (query_gradient_producer, (
                q_descriptor, grad_descriptor, k_descriptor, v_descriptor, q_tiles, grad_tiles, k_ring, v_ring,
                fixed_ready, ready, free, batch, head, head // GROUP, start_m, tiles, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def consumer_tiles(consumer, first_tile, query_tiles, tiles, IS_CAUSAL: gl.constexpr):
    """How many of the `tiles` tiles of keys the 64 queries of a consumer see; queries beyond the end see none."""
    own = tiles
    if IS_CAUSAL:
        own = gl.minimum(tiles, first_tile + consumer + 1)
    return gl.where(first_tile + consumer < query_tiles, own, 0)


@gluon.jit
def saved_producer(
    k_descriptor, saved_descriptor, k_ring, saved_ring, ready, free,
    batch, kv_head, member, first_tile, query_tiles, tiles, tiles_of_head,
    IS_CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch `tiles` tiles of K, and with each of them the tile of every consumer that has one."""
    CONSUMERS: gl.constexpr = SAVED_CONSUMERS
    for index in range(tiles):
        stage = index % STAGES
        mbarrier.wait(free.index(stage), (index // STAGES & 1) ^ 1)
        barrier = ready.index(stage)
        mbarrier.expect(barrier, k_descriptor.block_type.nbytes)
        copy_tile(k_descriptor, batch, kv_head, index * ROWS, barrier, k_ring.index(stage))
        place = member * tiles_of_head + saved_place(first_tile, index, query_tiles, IS_CAUSAL)
        for consumer in gl.static_range(CONSUMERS):
            if index < consumer_tiles(consumer, first_tile, query_tiles, tiles, IS_CAUSAL):
                mbarrier.expect(barrier, saved_descriptor.block_type.nbytes)
                buffer = saved_ring.index(stage * CONSUMERS + consumer)
                tma.async_copy_global_to_shared(saved_descriptor, [place + consumer, 0, 0], barrier, buffer)
            else:
                mbarrier.arrive(barrier, count=1)


@gluon.jit
def saved_consumer(
    consumer, grad_q_descriptor, grad_q_tiles, k_ring, saved_ring, ready, free,
    batch, head, first_tile, query_tiles, tiles, scale,
    IS_CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of the 64 queries of one consumer."""
    WIDTH: gl.constexpr = k_ring.shape[4]
    CONSUMERS: gl.constexpr = SAVED_CONSUMERS
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, WIDTH, 16])
    own = consumer_tiles(consumer, first_tile, query_tiles, tiles, IS_CAUSAL)
    grad_q = gl.zeros([ROWS, WIDTH], gl.float32, sums_layout)
    for index in range(own):
        stage = index % STAGES
        mbarrier.wait(ready.index(stage), index // STAGES & 1)
        saved = square(saved_ring.index(stage * CONSUMERS + consumer)).permute([1, 0])
        grad_q = warpgroup_mma(saved, matrix(k_ring.index(stage)), grad_q, is_async=True)
        # The product before this one is done, and its buffers are free.
        grad_q = warpgroup_mma_wait(1, deps=[grad_q])
        mbarrier.arrive(free.index((index + STAGES - 1) % STAGES), count=1, pred=index > 0)
    grad_q = warpgroup_mma_wait(0, deps=[grad_q])
    mbarrier.arrive(free.index((own + STAGES - 1) % STAGES), count=1, pred=own > 0)
    # Tiles that only a later consumer has. Waiting first keeps this arrival out of an earlier phase.
    for index in range(own, tiles):
        mbarrier.wait(ready.index(index % STAGES), index // STAGES & 1)
        mbarrier.arrive(free.index(index % STAGES), count=1)
    first_query = (first_tile + consumer) * ROWS
    store_matrix(grad_q_descriptor, batch, head, first_query, grad_q_tiles.index(consumer), grad_q * scale)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "first_head", "all_heads", "section", "queries", "keys", "tiles_of_head"])
def attention_saved_query_gradient_hopper_kernel(
    grad_q, k_descriptor, saved_descriptor, grad_q_descriptor,
    heads, first_head, all_heads, section, queries, keys, tiles_of_head, scale,
    GROUP: gl.constexpr, IS_CAUSAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program: dQ of 256 queries of one head, from the gradients of the scores that the kernel of dK and dV saved.

    The heads `first_head ... first_head + all_heads` have their turn, counted over the batch.
    """
    CONSUMERS: gl.constexpr = SAVED_CONSUMERS
    blocks = gl.cdiv(queries, CONSUMERS * ROWS)
    member, rank = located(gl.program_id(0), all_heads, blocks, section)
    first_tile = (blocks - 1 - rank) * CONSUMERS
    batch = (first_head + member) // heads
    head = (first_head + member) % heads
    query_tiles = gl.cdiv(queries, ROWS)
    tiles = gl.cdiv(keys, ROWS)
    if IS_CAUSAL:
        tiles = gl.minimum(tiles, gl.minimum(first_tile + CONSUMERS, query_tiles))

    k_ring = buffers(STAGES, k_descriptor)
    saved_ring = buffers(STAGES * CONSUMERS, saved_descriptor)
    grad_q_tiles = buffers(CONSUMERS, grad_q_descriptor)
    ready = barriers(STAGES)
    free = barriers(STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1 + CONSUMERS)
        mbarrier.init(free.index(stage), count=CONSUMERS)
    fence_async_shared()

    gl.warp_specialize(
        [
            (saved_consumer, (
                0, grad_q_descriptor, grad_q_tiles, k_ring, saved_ring, ready, free,
                batch, head, first_tile, query_tiles, tiles, scale, IS_CAUSAL, STAGES,
            )),
            (saved_consumer, (
                1, grad_q_descriptor, grad_q_tiles, k_ring, saved_ring, ready, free,
                batch, head, first_tile, query_tiles, tiles, scale, IS_CAUSAL, STAGES,
            )),
            (saved_consumer, (
                2, grad_q_descriptor, grad_q_tiles, k_ring, saved_ring, ready, free,
                batch, head, first_tile, query_tiles, tiles, scale, IS_CAUSAL, STAGES,
            )),
            (saved_consumer, (
                3, grad_q_descriptor, grad_q_tiles, k_ring, saved_ring, ready, free,
                batch, head, first_tile, query_tiles, tiles, scale, IS_CAUSAL, STAGES,
            )),
            (saved_producer, (
                k_descriptor, saved_descriptor, k_ring, saved_ring, ready, free,
                batch, head // GROUP, member, first_tile, query_tiles, tiles, tiles_of_head, IS_CAUSAL, STAGES,
            )),
        ],
        [4, 4, 4, 1],
        [104, 104, 104, 24],
    )  # fmt: skip
