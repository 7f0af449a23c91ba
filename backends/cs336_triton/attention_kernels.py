"""FlashAttention-2 as four kernels: forward, the row sums of grad · output, dQ, and dK with dV.

Scores never leave the chip. The forward pass keeps a running maximum and sum per query and saves their logarithm (the
log-sum-exp, LSE); the backward pass recomputes the probabilities from it. An LSE of a thousand is rounded to 3e-5 in
float32, which half precision does not notice; PRECISE keeps the maximum and the sum apart for float32 inputs. dQ sums
over keys in one program and dK, dV sum over queries in another, so nothing is added atomically and every run gives the
same bits.

Only tiles that a boundary crosses are masked (`EDGE`): the causal diagonal, the last keys, an arbitrary mask, document
ids. Tiles above the diagonal, or wholly outside the documents of a tile, are never visited. Exponentials are powers of
two with the factor `scale · log2(e)` folded in.

Positions within a sequence are int32; every offset that a stride or a program id enters is int64. Inside a tile,
`row * stride` is int32: the host copies inputs whose rows lie so far apart that this could overflow.

Source: Dao 2023, "FlashAttention-2", https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operators import scalar
from .runtime import dot, narrow

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
DOCUMENT_CHUNK: tl.constexpr = tl.constexpr(1024)


@triton.jit
def load_tile(
    pointer, stride, start, length,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows `start ... start + BLOCK` of a (length, WIDTH) matrix; zeros outside it."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_WIDTH)
    pointers = pointer + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if CHECK_ROWS and WIDTH != BLOCK_WIDTH:
        tile = tl.load(pointers, mask=(start + row < length)[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=(start + row < length)[:, None], other=0.0)
    elif WIDTH != BLOCK_WIDTH:
        tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_rows(
    pointer, descriptor, stride, start, length,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHECK_ROWS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """`load_tile`, or the same tile through a tensor descriptor: the copy engine fetches it and fills in the zeros."""
    if DESCRIPTORS:
        tile = descriptor.load([start, 0])
    else:
        tile = load_tile(pointer, stride, start, length, WIDTH, BLOCK, BLOCK_WIDTH, CHECK_ROWS)
    return tile


@triton.jit
def store_tile(
    pointer, stride, start, length, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):  # fmt: skip
    """Write a tile to rows `start ... start + BLOCK` of a (length, WIDTH) matrix, rounded to the matrix's dtype."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_WIDTH)
    pointers = pointer + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    inside = (start + row < length)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointers, narrow(tile, pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_ids(documents, stride, positions, length, outside, HAS_DOCUMENTS: tl.constexpr):
    """The document ids at `positions`, `outside` beyond the end; zeros where there are no documents."""
    if HAS_DOCUMENTS:
        ids = tl.load(documents + tl.cast(positions, tl.int64) * stride, mask=positions < length, other=outside)
    else:
        ids = tl.zeros_like(positions)
    return ids


@triton.jit
def document_span(documents, stride, start, length, BLOCK: tl.constexpr):
    """The first and one past the last position whose document can meet those of positions `start ... start + BLOCK`.

    Exact where every document is contiguous; ids in any order stay correct, because each tile compares ids as well.
    """
    positions = start + tl.arange(0, BLOCK)
    ids = load_ids(documents, stride, positions, length, 0, True)
    # Rows beyond the end must not widen the range of ids: they repeat the tile's first one.
    first_id = tl.load(documents + tl.cast(start, tl.int64) * stride)
    ids = tl.where(positions < length, ids, first_id)
    smallest = tl.min(ids, axis=0)
    largest = tl.max(ids, axis=0)
    first = tl.min(positions, axis=0)
    last = first
    for chunk in tl.range(0, length, DOCUMENT_CHUNK):
        candidates = chunk + tl.arange(0, DOCUMENT_CHUNK)
        found = load_ids(documents, stride, candidates, length, 0, True)
        meets = (candidates < length) & (found >= smallest) & (found <= largest)
        first = tl.minimum(first, tl.min(tl.where(meets, candidates, length), axis=0))
        last = tl.maximum(last, tl.max(tl.where(meets, candidates, 0), axis=0))
    return first, last + 1


@triton.jit
def attended(
    rows, columns, row_ids, column_ids, queries, keys, mask, stride_mask_m, stride_mask_n,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Which (query, key) pairs of a tile count. `rows` and `columns` broadcast against each other, either way round."""
    keep = (columns < keys) & (rows < queries)
    if IS_CAUSAL:
        keep = keep & (rows >= columns)
    if HAS_DOCUMENTS:
        keep = keep & (row_ids == column_ids)
    if HAS_MASK:
        offsets = tl.cast(rows, tl.int64) * stride_mask_m + tl.cast(columns, tl.int64) * stride_mask_n
        keep = keep & (tl.load(mask + offsets, mask=keep, other=0) != 0)
    return keep


@triton.jit
def forward_tiles(
    output, total, peak, q_tile, k, v, k_descriptor, v_descriptor, stride_kn, stride_vn, first, end, rows, row_ids,
    queries, keys, scale_log2, mask, stride_mask_m, stride_mask_n, documents, stride_document,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EDGE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Attend to keys `first ... end` and return the new (output, total, peak), all three not yet normalised."""
    for start in tl.range(first, end, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k_tile = load_rows(k, k_descriptor, stride_kn, start, keys, D, BLOCK_N, BLOCK_D, EDGE, DESCRIPTORS)
        scores = dot(q_tile, tl.trans(k_tile), tl.zeros([q_tile.shape[0], BLOCK_N], dtype=output.dtype))
        if EDGE:
            columns = start + tl.arange(0, BLOCK_N)
            column_ids = load_ids(documents, stride_document, columns, keys, 0, HAS_DOCUMENTS)
            keep = attended(
                rows[:, None], columns[None, :], row_ids[:, None], column_ids[None, :], queries, keys,
                mask, stride_mask_m, stride_mask_n, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS,
            )  # fmt: skip
            scores = tl.where(keep, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale_log2)
        # A row that has seen no key yet has peak -inf, and -inf - -inf is not a number.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if EDGE else new_peak
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        correction = tl.exp2(peak - shift)
        total = total * correction + tl.sum(weights, axis=1)
        v_tile = load_rows(v, v_descriptor, stride_vn, start, keys, VALUE_D, BLOCK_N, BLOCK_V, EDGE, DESCRIPTORS)
        output = dot(narrow(weights, v_tile.dtype), v_tile, output * correction[:, None])
        peak = new_peak
    return output, total, peak


@triton.jit
def forward_block(
    program, q, k, v, o, lse, statistics, mask, documents,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_document_b, stride_document,
    heads, queries, keys, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head against all their keys."""
    blocks = tl.cdiv(queries, BLOCK_M)
    batch = program // (blocks * heads)
    head = program // blocks % heads
    block = program % blocks
    if IS_CAUSAL:
        # The last queries have the most keys: start them first, so that no long program is left at the end.
        block = blocks - 1 - block
    start_m = (block * BLOCK_M).to(tl.int32)
    rows = start_m + tl.arange(0, BLOCK_M)

    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head // GROUP * stride_kh
    v += batch * stride_vb + head // GROUP * stride_vh
    o += batch * stride_ob + head * stride_oh
    if HAS_MASK:
        mask += batch * stride_mask_b + head * stride_mask_h
    if HAS_DOCUMENTS:
        documents += batch * stride_document_b

    first = tl.full([], 0, tl.int32)
    end = first + keys
    if IS_CAUSAL:
        end = tl.minimum(end, start_m + BLOCK_M)
    full_end = end // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        full_end = tl.minimum(full_end, (start_m + 1) // BLOCK_N * BLOCK_N)
    if HAS_DOCUMENTS:
        first_met, end_met = document_span(documents, stride_document, start_m, keys, BLOCK_M)
        first = first_met // BLOCK_N * BLOCK_N
        end = tl.minimum(end, end_met)
    if HAS_MASK or HAS_DOCUMENTS:
        full_end = first

    k_descriptor = k
    v_descriptor = v
    if DESCRIPTORS:
        k_descriptor = tl.make_tensor_descriptor(k, [keys, D], [stride_kn, 1], [BLOCK_N, BLOCK_D])
        v_descriptor = tl.make_tensor_descriptor(v, [keys, VALUE_D], [stride_vn, 1], [BLOCK_N, BLOCK_V])
    q_tile = load_tile(q, stride_qm, start_m, queries, D, BLOCK_M, BLOCK_D, True)
    row_ids = load_ids(documents, stride_document, rows, queries, 0, HAS_DOCUMENTS)
    output = tl.zeros([BLOCK_M, BLOCK_V], dtype=ACCUMULATOR)
    total = tl.zeros([BLOCK_M], dtype=ACCUMULATOR)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=ACCUMULATOR)
    if not (HAS_MASK or HAS_DOCUMENTS):
        output, total, peak = forward_tiles(
            output, total, peak, q_tile, k, v, k_descriptor, v_descriptor, stride_kn, stride_vn, first, full_end, rows,
            row_ids, queries, keys, scale_log2, mask, stride_mask_m, stride_mask_n, documents, stride_document, D,
            VALUE_D, BLOCK_D,
            BLOCK_V, BLOCK_N, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, False, DESCRIPTORS, WARP_SPECIALIZE,
        )  # fmt: skip
    output, total, peak = forward_tiles(
        output, total, peak, q_tile, k, v, k_descriptor, v_descriptor, stride_kn, stride_vn, full_end, end, rows,
        row_ids, queries, keys, scale_log2, mask, stride_mask_m, stride_mask_n, documents, stride_document, D,
        VALUE_D, BLOCK_D,
        BLOCK_V, BLOCK_N, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, True, DESCRIPTORS, False,
    )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    store_tile(o, stride_om, start_m, queries, output / total[:, None], VALUE_D, BLOCK_M, BLOCK_V)
    log2_total = tl.log2(total)
    log_sum = tl.where(empty, float("-inf"), (peak + log2_total) * LN_2)
    row = (batch * heads + head) * queries + rows
    tl.store(lse + row, log_sum, mask=rows < queries)
    if PRECISE:
        tl.store(statistics + 2 * row, tl.where(empty, float("inf"), peak), mask=rows < queries)
        tl.store(statistics + 2 * row + 1, log2_total, mask=rows < queries)


@triton.jit
def attention_forward_kernel(
    q, k, v, o, lse, statistics, mask, documents,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_document_b, stride_document,
    batches, heads, queries, keys, scale_log2: tl.float64,
    GROUP: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, ACCUMULATOR: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One block of queries per program; PERSISTENT programs take every num_programs-th block."""
    program = tl.program_id(0).to(tl.int64)
    if PERSISTENT:
        for block in tl.range(program, tl.cdiv(queries, BLOCK_M) * batches * heads, tl.num_programs(0)):
            forward_block(
                tl.cast(block, tl.int64),
                q, k, v, o, lse, statistics, mask, documents,
                stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                stride_ob, stride_oh, stride_om,
                stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_document_b, stride_document,
                heads, queries, keys, scalar(scale_log2, ACCUMULATOR), GROUP, D, VALUE_D, BLOCK_D, BLOCK_V, IS_CAUSAL,
                HAS_MASK, HAS_DOCUMENTS, ACCUMULATOR, PRECISE, BLOCK_M, BLOCK_N, DESCRIPTORS, WARP_SPECIALIZE,
            )  # fmt: skip
    else:
        forward_block(
            program,
            q, k, v, o, lse, statistics, mask, documents,
            stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            stride_ob, stride_oh, stride_om,
            stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_document_b, stride_document,
            heads, queries, keys, scalar(scale_log2, ACCUMULATOR), GROUP, D, VALUE_D, BLOCK_D, BLOCK_V, IS_CAUSAL,
            HAS_MASK, HAS_DOCUMENTS, ACCUMULATOR, PRECISE, BLOCK_M, BLOCK_N, DESCRIPTORS, WARP_SPECIALIZE,
        )  # fmt: skip


@triton.jit
def attention_delta_kernel(
    o, grad, delta, stride_ob, stride_oh, stride_om, stride_gb, stride_gh, stride_gm, heads, queries,
    VALUE_D: tl.constexpr, BLOCK_V: tl.constexpr, ACCUMULATOR: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta[i] = sum over features of o[i] · grad[i]: what the softmax's backward pass subtracts from each row."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    batch = program // (blocks * heads)
    head = program // blocks % heads
    start_m = (program % blocks * BLOCK_M).to(tl.int32)
    rows = start_m + tl.arange(0, BLOCK_M)
    o += batch * stride_ob + head * stride_oh
    grad += batch * stride_gb + head * stride_gh
    output = load_tile(o, stride_om, start_m, queries, VALUE_D, BLOCK_M, BLOCK_V, True).to(ACCUMULATOR)
    gradient = load_tile(grad, stride_gm, start_m, queries, VALUE_D, BLOCK_M, BLOCK_V, True).to(ACCUMULATOR)
    sums = tl.sum(output * gradient, axis=1)
    tl.store(delta + (batch * heads + head) * queries + rows, sums, mask=rows < queries)


@triton.jit
def load_normaliser(lse, statistics, rows, queries, PRECISE: tl.constexpr):
    """What to subtract from a row's base-2 exponents, in two parts, of which the second is 0 unless PRECISE.

    The first is +inf, hence probability 0, for fully masked rows and beyond the end.
    """
    inside = rows < queries
    if PRECISE:
        peak = tl.load(statistics + 2 * rows, mask=inside, other=float("inf"))
        log2_total = tl.load(statistics + 2 * rows + 1, mask=inside, other=0.0)
    else:
        natural = tl.load(lse + rows, mask=inside, other=float("inf"))
        peak = tl.where(natural == float("-inf"), float("inf"), natural * LOG2_E)
        log2_total = tl.zeros_like(peak)
    return peak, log2_total


@triton.jit
def query_gradient_tiles(
    grad_q, q_tile, grad_tile, peak, log2_total, delta, k, v, k_descriptor, v_descriptor, stride_kn, stride_vn, first,
    end, rows, row_ids, queries, keys, scale_log2, mask, stride_mask_m, stride_mask_n, documents, stride_document,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EDGE: tl.constexpr,
    PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Add the part of dQ / scale that comes from keys `first ... end`."""
    for start in tl.range(first, end, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k_tile = load_rows(k, k_descriptor, stride_kn, start, keys, D, BLOCK_N, BLOCK_D, EDGE, DESCRIPTORS)
        zeros = tl.zeros([q_tile.shape[0], BLOCK_N], dtype=grad_q.dtype)
        exponents = dot(q_tile, tl.trans(k_tile), zeros) * scale_log2 - peak[:, None]
        if PRECISE:
            exponents -= log2_total[:, None]
        if EDGE:
            columns = start + tl.arange(0, BLOCK_N)
            column_ids = load_ids(documents, stride_document, columns, keys, 0, HAS_DOCUMENTS)
            keep = attended(
                rows[:, None], columns[None, :], row_ids[:, None], column_ids[None, :], queries, keys,
                mask, stride_mask_m, stride_mask_n, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS,
            )  # fmt: skip
            exponents = tl.where(keep, exponents, float("-inf"))
        probabilities = tl.exp2(exponents)
        v_tile = load_rows(v, v_descriptor, stride_vn, start, keys, VALUE_D, BLOCK_N, BLOCK_V, EDGE, DESCRIPTORS)
        grad_scores = probabilities * (dot(grad_tile, tl.trans(v_tile), zeros) - delta[:, None])
        grad_q = dot(narrow(grad_scores, k_tile.dtype), k_tile, grad_q)
    return grad_q


@triton.jit
def attention_query_gradient_kernel(
    q, k, v, grad, lse, statistics, delta, grad_q, mask, documents,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_dqb, stride_dqh, stride_dqm,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_document_b, stride_document,
    heads, queries, keys, scale: tl.float64, scale_log2: tl.float64,
    GROUP: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One program: dQ of BLOCK_M queries of one head, summed over all their keys."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(queries, BLOCK_M)
    batch = program // (blocks * heads)
    head = program // blocks % heads
    block = program % blocks
    if IS_CAUSAL:
        block = blocks - 1 - block
    start_m = (block * BLOCK_M).to(tl.int32)
    rows = start_m + tl.arange(0, BLOCK_M)

    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + head // GROUP * stride_kh
    v += batch * stride_vb + head // GROUP * stride_vh
    grad += batch * stride_gb + head * stride_gh
    grad_q += batch * stride_dqb + head * stride_dqh
    lse += (batch * heads + head) * queries
    if PRECISE:
        statistics += 2 * (batch * heads + head) * queries
    delta += (batch * heads + head) * queries
    if HAS_MASK:
        mask += batch * stride_mask_b + head * stride_mask_h
    if HAS_DOCUMENTS:
        documents += batch * stride_document_b

    first = tl.full([], 0, tl.int32)
    end = first + keys
    if IS_CAUSAL:
        end = tl.minimum(end, start_m + BLOCK_M)
    full_end = end // BLOCK_N * BLOCK_N
    if IS_CAUSAL:
        full_end = tl.minimum(full_end, (start_m + 1) // BLOCK_N * BLOCK_N)
    if HAS_DOCUMENTS:
        first_met, end_met = document_span(documents, stride_document, start_m, keys, BLOCK_M)
        first = first_met // BLOCK_N * BLOCK_N
        end = tl.minimum(end, end_met)
    if HAS_MASK or HAS_DOCUMENTS:
        full_end = first

    k_descriptor = k
    v_descriptor = v
    if DESCRIPTORS:
        k_descriptor = tl.make_tensor_descriptor(k, [keys, D], [stride_kn, 1], [BLOCK_N, BLOCK_D])
        v_descriptor = tl.make_tensor_descriptor(v, [keys, VALUE_D], [stride_vn, 1], [BLOCK_N, BLOCK_V])
    q_tile = load_tile(q, stride_qm, start_m, queries, D, BLOCK_M, BLOCK_D, True)
    grad_tile = load_tile(grad, stride_gm, start_m, queries, VALUE_D, BLOCK_M, BLOCK_V, True)
    peak, log2_total = load_normaliser(lse, statistics, rows, queries, PRECISE)
    delta_rows = tl.load(delta + rows, mask=rows < queries, other=0.0)
    row_ids = load_ids(documents, stride_document, rows, queries, 0, HAS_DOCUMENTS)
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACCUMULATOR)
    if not (HAS_MASK or HAS_DOCUMENTS):
        total = query_gradient_tiles(
            total, q_tile, grad_tile, peak, log2_total, delta_rows, k, v, k_descriptor, v_descriptor, stride_kn,
            stride_vn, first, full_end, rows, row_ids, queries, keys, scalar(scale_log2, ACCUMULATOR), mask,
            stride_mask_m, stride_mask_n, documents, stride_document, D, VALUE_D, BLOCK_D, BLOCK_V, BLOCK_N, IS_CAUSAL,
            HAS_MASK, HAS_DOCUMENTS, False, PRECISE, DESCRIPTORS, WARP_SPECIALIZE,
        )  # fmt: skip
    total = query_gradient_tiles(
        total, q_tile, grad_tile, peak, log2_total, delta_rows, k, v, k_descriptor, v_descriptor, stride_kn, stride_vn,
        full_end, end, rows, row_ids, queries, keys, scalar(scale_log2, ACCUMULATOR), mask, stride_mask_m,
        stride_mask_n, documents, stride_document, D, VALUE_D, BLOCK_D, BLOCK_V, BLOCK_N, IS_CAUSAL, HAS_MASK,
        HAS_DOCUMENTS, True, PRECISE, DESCRIPTORS, False,
    )  # fmt: skip
    store_tile(grad_q, stride_dqm, start_m, queries, total * scalar(scale, ACCUMULATOR), D, BLOCK_M, BLOCK_D)


@triton.jit
def key_gradient_tiles(
    grad_k, grad_v, k_tile, v_tile, q, grad, q_descriptor, grad_descriptor, lse, statistics, delta, stride_qm,
    stride_gm, first, end, columns, column_ids, queries, keys, scale_log2, mask, stride_mask_m, stride_mask_n,
    documents, stride_document,
    D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, EVEN_QUERIES: tl.constexpr,
    EDGE: tl.constexpr, PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Add the parts of dK / scale and dV that come from queries `first ... end`. Tiles are (keys, queries) here."""
    for start in tl.range(first, end, BLOCK_M, warp_specialize=WARP_SPECIALIZE):
        rows = start + tl.arange(0, BLOCK_M)
        q_tile = load_rows(
            q, q_descriptor, stride_qm, start, queries, D, BLOCK_M, BLOCK_D, not EVEN_QUERIES, DESCRIPTORS
        )
        zeros = tl.zeros([k_tile.shape[0], BLOCK_M], dtype=grad_k.dtype)
        peak, log2_total = load_normaliser(lse, statistics, rows, queries, PRECISE)
        exponents = dot(k_tile, tl.trans(q_tile), zeros) * scale_log2 - peak[None, :]
        if PRECISE:
            exponents -= log2_total[None, :]
        if EDGE:
            row_ids = load_ids(documents, stride_document, rows, queries, 0, HAS_DOCUMENTS)
            keep = attended(
                rows[None, :], columns[:, None], row_ids[None, :], column_ids[:, None], queries, keys,
                mask, stride_mask_m, stride_mask_n, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS,
            )  # fmt: skip
            exponents = tl.where(keep, exponents, float("-inf"))
        probabilities = tl.exp2(exponents)
        grad_tile = load_rows(
            grad, grad_descriptor, stride_gm, start, queries, VALUE_D, BLOCK_M, BLOCK_V, not EVEN_QUERIES, DESCRIPTORS
        )
        grad_v = dot(narrow(probabilities, grad_tile.dtype), grad_tile, grad_v)
        delta_rows = tl.load(delta + rows, mask=rows < queries, other=0.0)
        grad_scores = probabilities * (dot(v_tile, tl.trans(grad_tile), zeros) - delta_rows[None, :])
        grad_k = dot(narrow(grad_scores, q_tile.dtype), q_tile, grad_k)
    return grad_k, grad_v


@triton.jit
def attention_key_gradient_kernel(
    q, k, v, grad, lse, statistics, delta, grad_k, grad_v, mask, documents,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_gb, stride_gh, stride_gm, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_document_b, stride_document,
    kv_heads, queries, keys, scale: tl.float64, scale_log2: tl.float64,
    GROUP: tl.constexpr, D: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PRECISE: tl.constexpr, EVEN_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one key head, summed over the queries of all its GROUP heads."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(keys, BLOCK_N)
    batch = program // (blocks * kv_heads)
    kv_head = program // blocks % kv_heads
    start_n = (program % blocks * BLOCK_N).to(tl.int32)
    columns = start_n + tl.arange(0, BLOCK_N)

    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    grad_k += batch * stride_dkb + kv_head * stride_dkh
    grad_v += batch * stride_dvb + kv_head * stride_dvh
    if HAS_DOCUMENTS:
        documents += batch * stride_document_b

    first = tl.full([], 0, tl.int32)
    end = first + queries
    if IS_CAUSAL:
        first = start_n // BLOCK_M * BLOCK_M
    # From here on every query sees every key of this tile.
    full_first = first
    if IS_CAUSAL:
        full_first = tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    if HAS_DOCUMENTS:
        first_met, end_met = document_span(documents, stride_document, start_n, keys, BLOCK_N)
        first = tl.maximum(first, first_met // BLOCK_M * BLOCK_M)
        end = tl.minimum(end, end_met)
    edge_end = tl.minimum(full_first, end)
    if HAS_MASK or HAS_DOCUMENTS or start_n + BLOCK_N > keys:
        edge_end = end

    k_tile = load_tile(k, stride_kn, start_n, keys, D, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(v, stride_vn, start_n, keys, VALUE_D, BLOCK_N, BLOCK_V, True)
    column_ids = load_ids(documents, stride_document, columns, keys, 0, HAS_DOCUMENTS)
    total_k = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACCUMULATOR)
    total_v = tl.zeros([BLOCK_N, BLOCK_V], dtype=ACCUMULATOR)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        head_q = q + batch * stride_qb + head * stride_qh
        head_grad = grad + batch * stride_gb + head * stride_gh
        q_descriptor = head_q
        grad_descriptor = head_grad
        if DESCRIPTORS:
            q_descriptor = tl.make_tensor_descriptor(head_q, [queries, D], [stride_qm, 1], [BLOCK_M, BLOCK_D])
            grad_descriptor = tl.make_tensor_descriptor(
                head_grad, [queries, VALUE_D], [stride_gm, 1], [BLOCK_M, BLOCK_V]
            )
        head_lse = lse + (batch * kv_heads * GROUP + head) * queries
        head_statistics = statistics
        if PRECISE:
            head_statistics = statistics + 2 * (batch * kv_heads * GROUP + head) * queries
        head_delta = delta + (batch * kv_heads * GROUP + head) * queries
        head_mask = mask
        if HAS_MASK:
            head_mask = mask + (batch * stride_mask_b + head * stride_mask_h)
        total_k, total_v = key_gradient_tiles(
            total_k, total_v, k_tile, v_tile, head_q, head_grad, q_descriptor, grad_descriptor, head_lse,
            head_statistics, head_delta, stride_qm, stride_gm, first, edge_end, columns, column_ids, queries, keys,
            scalar(scale_log2, ACCUMULATOR), head_mask, stride_mask_m, stride_mask_n, documents, stride_document, D,
            VALUE_D, BLOCK_D, BLOCK_V, BLOCK_M, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, EVEN_QUERIES, True, PRECISE,
            DESCRIPTORS, False,
        )  # fmt: skip
        if not (HAS_MASK or HAS_DOCUMENTS):
            total_k, total_v = key_gradient_tiles(
                total_k, total_v, k_tile, v_tile, head_q, head_grad, q_descriptor, grad_descriptor, head_lse,
                head_statistics, head_delta, stride_qm, stride_gm, edge_end, end, columns, column_ids, queries, keys,
                scalar(scale_log2, ACCUMULATOR), head_mask, stride_mask_m, stride_mask_n, documents, stride_document,
                D, VALUE_D, BLOCK_D, BLOCK_V, BLOCK_M, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, EVEN_QUERIES, False,
                PRECISE, DESCRIPTORS, WARP_SPECIALIZE,
            )  # fmt: skip
    store_tile(grad_k, stride_dkn, start_n, keys, total_k * scalar(scale, ACCUMULATOR), D, BLOCK_N, BLOCK_D)
    store_tile(grad_v, stride_dvn, start_n, keys, total_v, VALUE_D, BLOCK_N, BLOCK_V)
