"""Times the memory-bound kernels alone, without the host path, in many variants on one GPU.

    python benchmarks/rowwise_trial.py [--only softmax] [--seconds 28] [--processes 14] [--output FILE]

Everything is first compiled in parallel processes, which need no GPU (`--compile` does only that). Then each variant of
a problem runs inside a CUDA graph of several launches, after its result was compared with PyTorch's on rows from the
start, the middle and the end. A line per variant: microseconds, and the share of the copy bandwidth of the same run. At
the end the whole path through autograd stands beside the kernel's own time, with the host's time of a call.
`--rehearse` runs every variant at toy sizes in the interpreter. Needs torch, Triton and the checkout on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl
from cs336_triton import add_rmsnorm, cross_entropy, embedding, rmsnorm, rope, silu, softmax
from cs336_triton.runtime import INTERPRETING, Launch, launch, narrow

MULTIPROCESSORS = 132
ACCUMULATOR = tl.float32
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


# Designs that are not in the backend.


@triton.jit
def persistent_softmax_backward_kernel(
    grad_pointer,
    output_pointer,
    x_grad_pointer,
    n_rows,
    n_cols,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    mask = columns < n_cols
    for row in tl.range(tl.program_id(0).to(tl.int64), n_rows, tl.num_programs(0), num_stages=STAGES):
        at = row * n_cols + columns
        grad = tl.load(grad_pointer + at, mask=mask, other=0.0).to(tl.float32)
        output = tl.load(output_pointer + at, mask=mask, other=0.0).to(tl.float32)
        x_grad = output * (grad - tl.sum(grad * output, axis=0))
        tl.store(x_grad_pointer + at, narrow(x_grad, x_grad_pointer.dtype.element_ty), mask=mask)


@triton.jit
def cross_entropy_row_backward_kernel(
    logits_pointer,
    target_pointer,
    statistics_pointer,
    grad_pointer,
    logits_grad_pointer,
    n_rows,
    n_cols,
    scale,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    CACHE: tl.constexpr,
    EVICT: tl.constexpr,
):
    """A program takes a whole row, whose length BLOCK divides."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_pointer + row).to(tl.int32)
    highest = tl.load(statistics_pointer + row)
    log_sum = tl.load(statistics_pointer + n_rows + row) * LOG2_E
    grad = tl.load(grad_pointer).to(tl.float32) * scale
    lanes = tl.arange(0, BLOCK)
    for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
        at = row * n_cols + start + lanes
        logits = tl.load(logits_pointer + at, eviction_policy=EVICT).to(tl.float32)
        value = tl.exp2((logits - highest) * LOG2_E - log_sum)
        if (target >= start) & (target < start + BLOCK):
            value = tl.where(lanes == target - start, value - 1.0, value)
        value = narrow(value * grad, logits_grad_pointer.dtype.element_ty)
        tl.store(logits_grad_pointer + at, value, cache_modifier=CACHE)


@triton.jit
def cross_entropy_tile_backward_kernel(
    logits_pointer,
    target_pointer,
    statistics_pointer,
    grad_pointer,
    logits_grad_pointer,
    n_rows,
    n_cols,
    scale,
    BLOCK: tl.constexpr,
    CACHE: tl.constexpr,
    EVICT: tl.constexpr,
    COMPARE_ALL: tl.constexpr,
):
    """A program takes a tile of a row, whose length BLOCK divides."""
    tiles = n_cols // BLOCK
    row = tl.program_id(0).to(tl.int64) // tiles
    start = (tl.program_id(0).to(tl.int64) % tiles).to(tl.int32) * BLOCK
    lanes = tl.arange(0, BLOCK)
    at = row * n_cols + start + lanes
    place = tl.load(target_pointer + row).to(tl.int32) - start
    logits = tl.load(logits_pointer + at, eviction_policy=EVICT).to(tl.float32)
    highest = tl.load(statistics_pointer + row)
    log_sum = tl.load(statistics_pointer + n_rows + row) * LOG2_E
    grad = tl.load(grad_pointer).to(tl.float32) * scale
    value = tl.exp2((logits - highest) * LOG2_E - log_sum)
    if COMPARE_ALL or ((place >= 0) & (place < BLOCK)):
        value = tl.where(lanes == place, value - 1.0, value)
    value = narrow(value * grad, logits_grad_pointer.dtype.element_ty)
    tl.store(logits_grad_pointer + at, value, cache_modifier=CACHE)


@triton.jit
def prefetching_cross_entropy_kernel(
    logits_pointer,
    target_pointer,
    loss_pointer,
    statistics_pointer,
    n_rows,
    n_cols,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The next tile is asked for, into registers, before the tile at hand is worked on. BLOCK divides the row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    logits_row = logits_pointer + row * n_cols
    highest = tl.full((BLOCK // WIDTH,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK // WIDTH,), dtype=tl.float32)
    ahead = tl.load(logits_row + lanes)
    for start in range(BLOCK, n_cols + BLOCK, BLOCK):
        logits = ahead.to(tl.float32)
        ahead = tl.load(logits_row + tl.minimum(start, n_cols - BLOCK) + lanes)
        highest, total = cross_entropy.with_tile(highest, total, logits)
    row_highest = tl.max(highest, axis=0)
    log_sum = tl.log(tl.sum(total * softmax.exp_difference(highest, row_highest), axis=0))
    target = tl.load(target_pointer + row).to(tl.int64)
    loss = log_sum + (row_highest - tl.load(logits_row + target).to(tl.float32))
    tl.store(statistics_pointer + row, row_highest)
    tl.store(statistics_pointer + n_rows + row, log_sum)
    tl.store(loss_pointer + row, loss)


@triton.jit
def rope_block_kernel(
    q_pointer,
    k_pointer,
    q_output_pointer,
    k_output_pointer,
    cos_pointer,
    sin_pointer,
    n_positions,
    heads,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Contiguous (B, H, S, D): all heads of a group are loaded before the first is turned."""
    tiles = n_positions // POSITIONS
    groups = heads // HEADS
    batch = tl.program_id(0).to(tl.int64) // tiles
    positions = (tl.program_id(0).to(tl.int64) % tiles) * POSITIONS + tl.arange(0, POSITIONS)
    group = tl.program_id(1).to(tl.int64)
    if group < groups:
        x_pointer = q_pointer
        output_pointer = q_output_pointer
    else:
        x_pointer = k_pointer
        output_pointer = k_output_pointer
    first = batch * heads + (group % groups) * HEADS
    head = first + tl.arange(0, HEADS)[:, None, None]
    at = (head * n_positions + positions[None, :, None]) * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, None, :]
    x = tl.load(x_pointer + at).to(tl.float32)
    table = positions[None, :, None] * PAIRS + tl.arange(0, PAIRS)[None, None, :]
    cos = tl.load(cos_pointer + table)
    sin = tl.load(sin_pointer + table)
    even, odd = tl.split(tl.reshape(x, (HEADS, POSITIONS, PAIRS, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, (HEADS, POSITIONS, 2 * PAIRS))
    tl.store(output_pointer + at, narrow(turned, output_pointer.dtype.element_ty))


@triton.jit
def embedding_by_token_kernel(
    grad_pointer,
    first_pointer,
    order_pointer,
    weight_grad_pointer,
    n_cols,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of dW, zeros where the token does not occur: nothing needs to be zeroed before. BLOCK divides the row."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = tl.load(first_pointer + token)
    last = tl.load(first_pointer + token + 1)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(first, last, ROWS):
        places = start + tl.arange(0, ROWS)[:, None]
        rows = tl.load(order_pointer + places, mask=places < last, other=0).to(tl.int64)
        total += tl.load(grad_pointer + rows * n_cols + columns, mask=places < last, other=0.0).to(tl.float32)
    at = token * n_cols + tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(weight_grad_pointer + at, narrow(tl.sum(total, axis=0), weight_grad_pointer.dtype.element_ty))


# Problems.


@dataclass
class Problem:
    """Launches by variant name, what they must move, and the results to compare: (found, expected) pairs of rows."""

    name: str
    moved: float
    outputs: list[torch.Tensor]
    expected: Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]
    variants: dict[str, list[Launch]] = field(default_factory=dict)
    tolerance: float = 0.02

    def add(self, name: str, kernel: Any, grid: Any, arguments: Any, num_warps: int, **constants: Any) -> None:
        grid = grid if isinstance(grid, tuple) else (grid,)
        keywords = {**constants, "num_warps": num_warps, "num_stages": 2, "enable_fp_fusion": True}
        self.variants[name] = [Launch(kernel, grid, tuple(arguments), keywords)]


class Maker:
    """Tensors on the device at hand; without memory where something is only compiled."""

    def __init__(self, device: str) -> None:
        self.device, self.toy = device, device == "cpu"

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device).normal_()

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def size(self, rows: int, cols: int) -> tuple[int, int]:
        return (5, min(cols, 64)) if self.toy else (rows, cols)

    def block(self, wanted: int, n_cols: int) -> int:
        return min(wanted, triton.next_power_of_2(n_cols))


def some(x: torch.Tensor) -> torch.Tensor:
    """Rows from the start, the middle and the end."""
    rows = x.shape[0]
    if rows <= 96:
        return x
    return torch.cat((x[:32], x[rows // 2 : rows // 2 + 32], x[-32:]))


def rmsnorm_forward(make: Maker, rows: int, cols: int) -> Problem:
    rows, cols = make.size(rows, cols)
    x, weight = make.normal(rows, cols), make.normal(cols)
    output, rstd = make.empty(rows, cols), make.empty(rows, dtype=torch.float32)

    def expected():
        wide = some(x).float()
        return [(some(output), wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * weight.float())]

    problem = Problem(f"rmsnorm_forward {rows}x{cols}", 4.0 * rows * cols, [output], expected)
    arguments = (x, x, weight, output, output, rstd, rows, cols, cols, cols, 1e-5)
    wide = cols > 8192
    for warps, tile in ((8, 1), (16, 1), (32, 1)) if wide else ((8, 1), (4, 1), (16, 1), (8, 2), (16, 2)):
        problem.add(
            f"warps={warps} ROWS={tile}",
            rmsnorm.forward_kernel,
            triton.cdiv(rows, tile),
            arguments,
            warps,
            ACCUMULATOR=ACCUMULATOR,
            ADD=False,
            WALK=False,
            ROWS=tile,
            BLOCK=cols,
        )
    return problem


def rmsnorm_backward(make: Maker, rows: int, cols: int, add: bool) -> Problem:
    rows, cols = make.size(rows, cols)
    x, grad, weight = make.normal(rows, cols), make.normal(rows, cols), make.normal(cols)
    extra = make.normal(rows, cols) if add else grad
    rstd, weight_truth = make.empty(rows, dtype=torch.float32), torch.zeros(cols, device=make.device)
    if make.device != "meta":
        for start in range(0, rows, 1024):
            part = slice(start, start + 1024)
            rstd[part] = (x[part].float().square().mean(1) + 1e-5).rsqrt()
            weight_truth += (grad[part].float() * x[part].float() * rstd[part, None]).sum(0)
    x_grad = make.empty(rows, cols)
    partial_sums = make.empty(8 * MULTIPROCESSORS, cols, dtype=torch.float32)
    weight_grad = make.empty(cols)

    def expected():
        normal = some(x).float() * some(rstd)[:, None]
        wide = some(grad).float() * weight.float()
        x_truth = some(rstd)[:, None] * (wide - normal * (wide * normal).mean(1, keepdim=True))
        return [(some(x_grad), x_truth + some(extra).float() if add else x_truth), (weight_grad, weight_truth)]

    name = f"{'add_' if add else ''}rmsnorm_backward {rows}x{cols}"
    problem = Problem(name, (8.0 if add else 6.0) * rows * cols, [x_grad, weight_grad], expected)
    # Warps, rows a tile, stages, whether the weight stays in registers, programs a multiprocessor.
    if cols > 8192:
        grid = [(32, 1, s, False, p) for s in (2, 1, 3) for p in (1, 2)] + [(16, 1, s, False, 1) for s in (1, 2, 3)]
        grid += [(16, 1, 2, True, 1), (32, 1, 2, True, 1)]
    elif add:
        grid = [(8, 1, 3, True, 2), (8, 1, 2, True, 2), (8, 1, 1, True, 3), (8, 1, 4, True, 2), (16, 1, 3, True, 2)]
        grid += [(16, 1, 2, True, 2), (16, 2, 2, True, 1), (8, 1, 2, False, 3)]
    else:
        grid = [(8, 1, 3, True, p) for p in (2, 1)] + [(8, 1, 2, True, p) for p in (1, 2, 4)]
        grid += [(8, 1, 1, True, p) for p in (2, 3, 4, 6)] + [(8, 1, 4, True, 2)]
        grid += [(4, 1, s, True, p) for s, p in ((1, 2), (1, 4), (2, 2), (3, 2), (4, 2))]
        grid += [(16, 1, s, True, p) for s, p in ((1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (4, 2))]
        grid += [(16, 2, 2, True, 1), (16, 2, 3, True, 1), (8, 2, 2, True, 1), (8, 2, 3, True, 1)]
        grid += [(8, 1, 1, False, 3), (8, 1, 2, False, 3), (8, 1, 3, False, 3), (16, 2, 2, False, 1)]
    for warps, tile, stages, keep, share in grid:
        programs = min(share * MULTIPROCESSORS, triton.cdiv(rows, tile))
        variant = f"warps={warps} ROWS={tile} STAGES={stages} KEEP_WEIGHT={keep:d} programs={share}x"
        problem.add(
            variant,
            rmsnorm.backward_kernel,
            programs,
            (grad, extra, x, weight, rstd, x_grad, partial_sums, rows, cols, cols, cols, cols),
            warps,
            ACCUMULATOR=ACCUMULATOR,
            ADD=add,
            KEEP_WEIGHT=keep,
            STAGES=stages,
            ROWS=tile,
            BLOCK=cols,
        )
        problem.add(
            "sum",
            rmsnorm.column_sum_kernel,
            triton.cdiv(cols, 32),
            (partial_sums, weight_grad, programs, cols),
            4,
            ACCUMULATOR=ACCUMULATOR,
            ROWS=64,
            BLOCK=32,
        )
        problem.variants[variant] += problem.variants.pop("sum")
    return problem


def softmax_forward(make: Maker, rows: int, cols: int) -> Problem:
    rows, cols = make.size(rows, cols)
    x, output = make.normal(rows, cols), make.empty(rows, cols)
    problem = Problem(
        f"softmax_forward {rows}x{cols}",
        4.0 * rows * cols,
        [output],
        lambda: [(some(output) * cols, some(x).float().softmax(1) * cols)],
    )
    shared = {"ACCUMULATOR": ACCUMULATOR}
    long = cols > 8192 or make.toy
    if long:
        deep = (32, 16) if cols > 16384 else (16, 32, 8)
        for warps, stages in [(w, s) for w in deep for s in (2, 3, 1)]:
            for share in (1,) if cols > 16384 else (1, 2):
                problem.add(
                    f"persistent warps={warps} STAGES={stages} programs={share}x",
                    softmax.pipelined_forward_kernel,
                    min(share * MULTIPROCESSORS, rows),
                    (x, output, rows, cols, cols),
                    warps,
                    **shared,
                    STAGES=stages,
                    BLOCK=cols,
                )
    for warps in (32, 16, 8) if long else (8, 4, 16):
        problem.add(
            f"one block warps={warps}",
            softmax.forward_kernel,
            rows,
            (x, output, rows, cols, cols),
            warps,
            **shared,
            WALK=False,
            STAGES=1,
            ROWS=1,
            BLOCK=cols,
        )
    if cols > 16384 or make.toy:
        for warps, block, stages in ((32, 4096, 1), (16, 4096, 1), (32, 8192, 1), (16, 8192, 1), (32, 8192, 2)):
            problem.add(
                f"walk warps={warps} BLOCK={block} STAGES={stages}",
                softmax.forward_kernel,
                rows,
                (x, output, rows, cols, cols),
                warps,
                **shared,
                WALK=True,
                STAGES=stages,
                ROWS=1,
                BLOCK=make.block(block, cols),
            )
    return problem


def softmax_backward(make: Maker, rows: int, cols: int) -> Problem:
    rows, cols = make.size(rows, cols)
    grad, output, x_grad = make.normal(rows, cols), make.empty(rows, cols), make.empty(rows, cols)
    if make.device != "meta":
        torch.softmax(make.normal(rows, cols), 1, out=output)

    def expected():
        y, dy = some(output).float(), some(grad).float()
        return [(some(x_grad) * cols, y * (dy - (y * dy).sum(1, keepdim=True)) * cols)]

    problem = Problem(f"softmax_backward {rows}x{cols}", 6.0 * rows * cols, [x_grad], expected)
    arguments = (grad, output, x_grad, rows, cols, cols)
    shared = {"ACCUMULATOR": ACCUMULATOR}
    for warps in (32, 16) if cols > 16384 else (16, 32, 8) if cols > 8192 else (8, 4, 16):
        problem.add(
            f"one block warps={warps}",
            softmax.backward_kernel,
            rows,
            arguments,
            warps,
            **shared,
            WALK=False,
            STAGES=1,
            ROWS=1,
            BLOCK=cols,
        )
    if cols > 8192 or make.toy:
        for warps, stages in ((32, 2), (16, 2), (32, 3)) if cols < 32768 else ((32, 2), (16, 2)):
            problem.add(
                f"persistent warps={warps} STAGES={stages}",
                persistent_softmax_backward_kernel,
                min(MULTIPROCESSORS, rows),
                (grad, output, x_grad, rows, cols),
                warps,
                STAGES=stages,
                BLOCK=cols,
            )
    if cols > 16384 or make.toy:
        for warps, block, stages in ((32, 4096, 1), (16, 4096, 1), (32, 8192, 1), (16, 8192, 1), (32, 8192, 2)):
            problem.add(
                f"walk warps={warps} BLOCK={block} STAGES={stages}",
                softmax.backward_kernel,
                rows,
                arguments,
                warps,
                **shared,
                WALK=True,
                STAGES=stages,
                ROWS=1,
                BLOCK=make.block(block, cols),
            )
    return problem


def targets_of(make: Maker, rows: int, cols: int) -> torch.Tensor:
    return (torch.arange(rows, device=make.device) * 31) % cols


def cross_entropy_forward(make: Maker, rows: int, cols: int) -> Problem:
    rows, cols = make.size(rows, cols)
    logits, targets = make.normal(rows, cols), targets_of(make, rows, cols)
    losses = make.empty(rows, dtype=torch.float32)
    both = make.empty(2, rows, dtype=torch.float32)

    def expected():
        truth = torch.nn.functional.cross_entropy(some(logits).float(), some(targets), reduction="none")
        return [(some(losses), truth)]

    problem = Problem(f"cross_entropy_forward {rows}x{cols}", 2.0 * rows * cols, [losses], expected, tolerance=1e-4)
    arguments = (logits, targets, losses, both, rows, cols)
    tiles = [(8, 4096, 1), (8, 2048, 1), (4, 2048, 1), (4, 4096, 1), (16, 8192, 1), (16, 4096, 1), (8, 8192, 1)]
    tiles += [(8, 4096, 2), (8, 4096, 3), (8, 2048, 3), (4, 2048, 3), (16, 8192, 3), (8, 2048, 4), (4, 1024, 1)]
    for warps, tile, stages in tiles:
        problem.add(
            f"warps={warps} TILE={tile} STAGES={stages}",
            cross_entropy.forward_kernel,
            rows,
            (*arguments, cols),
            warps,
            ACCUMULATOR=ACCUMULATOR,
            BLOCK=make.block(tile, cols),
            WIDTH=8,
            STAGES=stages,
        )
    for warps, tile in ((8, 4096), (8, 2048), (4, 2048), (16, 4096)):
        problem.add(
            f"next tile in registers warps={warps} TILE={tile}",
            prefetching_cross_entropy_kernel,
            rows,
            arguments,
            warps,
            BLOCK=make.block(tile, cols),
            WIDTH=8,
        )
    return problem


def cross_entropy_backward(make: Maker, rows: int, cols: int) -> Problem:
    rows, cols = make.size(rows, cols)
    logits, targets, output = make.normal(rows, cols), targets_of(make, rows, cols), make.empty(rows, cols)
    both, grad = make.empty(2, rows, dtype=torch.float32), torch.full((), 3.0, device=make.device)
    if make.device != "meta":
        for start in range(0, rows, 1024):
            part = logits[start : start + 1024].float()
            highest = part.amax(1)
            both[0, start : start + 1024] = highest
            both[1, start : start + 1024] = (part - highest[:, None]).exp().sum(1).log()

    def expected():
        truth = some(logits).float().softmax(1)
        truth[torch.arange(truth.shape[0]), some(targets)] -= 1
        return [(some(output), 3 * truth)]

    problem = Problem(f"cross_entropy_backward {rows}x{cols}", 4.0 * rows * cols, [output], expected)
    for warps, tile in ((8, 4096), (4, 2048), (8, 2048), (4, 4096), (16, 8192), (8, 8192), (4, 1024)):
        block = make.block(tile, cols)
        problem.add(
            f"warps={warps} TILE={tile}",
            cross_entropy.backward_kernel,
            rows * triton.cdiv(cols, block),
            (logits, targets, both, grad, output, rows, cols, cols, 0, 1.0),
            warps,
            ACCUMULATOR=ACCUMULATOR,
            BLOCK=block,
        )
    arguments = (logits, targets, both, grad, output, rows, cols, 1.0)
    for warps, tile, cache, evict, every in (
        (8, 4096, "", "", True),
        (8, 4096, ".cs", "", False),
        (8, 4096, ".cs", "evict_first", False),
        (8, 4096, "", "evict_first", False),
        (4, 2048, ".cs", "evict_first", False),
        (4, 2048, "", "", True),
    ):
        block = make.block(tile, cols)
        problem.add(
            f"unmasked warps={warps} TILE={tile} store={cache or '-'} load={evict or '-'} every={every:d}",
            cross_entropy_tile_backward_kernel,
            rows * (cols // block),
            arguments,
            warps,
            BLOCK=block,
            CACHE=cache,
            EVICT=evict,
            COMPARE_ALL=every,
        )
    for warps, tile, stages, cache in ((8, 4096, 1, ""), (8, 4096, 3, ""), (8, 2048, 3, ""), (8, 4096, 3, ".cs")):
        problem.add(
            f"row warps={warps} TILE={tile} STAGES={stages} store={cache or '-'}",
            cross_entropy_row_backward_kernel,
            rows,
            arguments,
            warps,
            STAGES=stages,
            BLOCK=make.block(tile, cols),
            CACHE=cache,
            EVICT="",
        )
    return problem


def rope_forward(make: Maker, heads: int, positions: int) -> Problem:
    batch, d = 4, 128
    if make.toy:
        batch, heads, positions, d = 2, 2, 8, 16
    q, k = make.normal(batch, heads, positions, d), make.normal(batch, heads, positions, d)
    q_output, k_output = make.empty(*q.shape), make.empty(*k.shape)
    cos, sin = (make.normal(positions, d // 2, dtype=torch.float32) for _ in range(2))

    def expected():
        pairs = []
        for x, found in ((q, q_output), (k, k_output)):
            for at in ((0, 0), (batch - 1, heads - 1), (batch // 2, heads // 2)):
                even, odd = x[at].float().unflatten(1, (-1, 2)).unbind(-1)
                pairs.append((found[at], torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(1)))
        return pairs

    name = f"rope {batch}x{heads}x{positions}x{d}"
    problem = Problem(name, 8.0 * q.numel(), [q_output, k_output], expected, tolerance=0.03)
    tensors = (q, k, q_output, k_output, cos, sin, cos)
    strides = (*q.stride()[:3], *k.stride()[:3], *q.stride()[:3], *k.stride()[:3])
    tiles = ((4, 2048, 4), (4, 2048, 1), (4, 2048, 8), (4, 4096, 4), (8, 4096, 4), (4, 1024, 4), (8, 2048, 4))
    for warps, entries, group in tiles:
        tile = min(max(entries // d, 1), positions)
        problem.add(
            f"warps={warps} ENTRIES={entries} HEADS={group}",
            rope.rotation_kernel,
            (triton.cdiv(positions, tile) * batch, 2 * triton.cdiv(heads, group)),
            (*tensors, positions, d // 2, positions, heads, heads, *strides, d // 2, d // 2, *cos[None].stride()),
            warps,
            ACCUMULATOR=ACCUMULATOR,
            BACKWARD=False,
            GIVEN_POSITIONS=False,
            BY_HEAD=False,
            HEADS=group,
            POSITIONS=tile,
            PAIRS=d // 2,
        )
    for warps, tile, group in ((4, 8, 4), (4, 4, 4), (4, 8, 2), (4, 16, 2), (8, 8, 4), (4, 4, 8), (8, 16, 4)):
        tile, group = min(tile, positions), min(group, heads)
        problem.add(
            f"block warps={warps} POSITIONS={tile} HEADS={group}",
            rope_block_kernel,
            (positions // tile * batch, 2 * heads // group),
            (q, k, q_output, k_output, cos, sin, positions, heads),
            warps,
            HEADS=group,
            POSITIONS=tile,
            PAIRS=d // 2,
        )
    return problem


def silu_problem(make: Maker, rows: int, cols: int, backward: bool) -> Problem:
    rows, cols = make.size(rows, cols)
    n = rows * cols
    x, grad, output = make.normal(rows, cols), make.normal(rows, cols), make.empty(rows, cols)

    def expected():
        wide, share = some(x).float(), some(x).float().sigmoid()
        truth = some(grad).float() * share * (1 + wide * (1 - share)) if backward else wide * share
        return [(some(output), truth)]

    name = f"silu_{'backward' if backward else 'forward'} {rows}x{cols}"
    problem = Problem(name, (6.0 if backward else 4.0) * n, [output], expected)
    for warps, entries in ((4, 2048), (4, 1024), (4, 4096), (8, 4096), (8, 8192)):
        problem.add(
            f"warps={warps} ENTRIES={entries}",
            silu.backward_kernel if backward else silu.forward_kernel,
            triton.cdiv(n, make.block(entries, n)),
            (grad, x, output, 1, n, n, n) if backward else (x, output, 1, n, n),
            warps,
            ACCUMULATOR=ACCUMULATOR,
            ROWS=1,
            BLOCK=make.block(entries, n),
        )
    return problem


def embedding_forward(make: Maker, rows: int, cols: int) -> Problem:
    rows, cols = make.size(rows, cols)
    tokens, weight, output = targets_of(make, rows, rows), make.normal(rows, cols), make.empty(rows, cols)
    problem = Problem(
        f"embedding_forward {rows}x{cols}",
        4.0 * rows * cols,
        [output],
        lambda: [(some(output), weight[some(tokens)].float())],
    )
    for warps, entries in ((4, 2048), (4, 1024), (4, 4096), (8, 4096), (2, 1024)):
        block = make.block(entries, cols)
        problem.add(
            f"warps={warps} ENTRIES={entries}",
            embedding.forward_kernel,
            rows * triton.cdiv(cols, block),
            (tokens, weight, output, rows, rows, cols, cols),
            warps,
            ROWS=1,
            BLOCK=block,
        )
    return problem


def embedding_backward(make: Maker, rows: int, cols: int) -> Problem:
    rows, cols = make.size(rows, cols)
    tokens, grad, output = targets_of(make, rows, rows), make.normal(rows, cols), make.empty(rows, cols)
    if make.device == "meta":
        in_order, order = tokens, tokens
        first = torch.empty(rows + 1, dtype=torch.int64, device="meta")
    else:
        in_order, order = torch.sort(tokens, stable=True)
        first = torch.searchsorted(in_order, torch.arange(rows + 1, device=make.device))

    def expected():
        truth = torch.zeros(rows, cols, device=grad.device).index_add_(0, tokens, grad.float())
        return [(some(output), some(truth))]

    problem = Problem(f"embedding_backward {rows}x{cols}", 4.0 * rows * cols, [output], expected)
    for warps, entries, width in ((8, 8192, 1024), (4, 4096, 1024), (8, 16384, 1024), (8, 4096, 512), (8, 8192, 4096)):
        block = make.block(width, cols)
        problem.add(
            f"after zeros warps={warps} ENTRIES={entries} WIDTH={width}",
            embedding.backward_kernel,
            (rows, triton.cdiv(cols, block)),
            (grad, in_order, order, output, rows, rows, cols, cols),
            warps,
            ACCUMULATOR=ACCUMULATOR,
            ROWS=max(entries // block, 1),
            BLOCK=block,
        )
    for warps, tile, width in ((4, 1, 1024), (4, 2, 1024), (4, 4, 1024), (4, 2, 2048), (8, 1, 4096), (8, 8, 1024)):
        block = make.block(width, cols)
        problem.add(
            f"by token warps={warps} ROWS={tile} WIDTH={width}",
            embedding_by_token_kernel,
            (rows, cols // block),
            (grad, first, order, output, cols),
            warps,
            ROWS=tile,
            BLOCK=block,
        )
    return problem


PROBLEMS: dict[str, Callable[[Maker], Problem]] = {
    "softmax_forward_32768": lambda make: softmax_forward(make, 8192, 32768),
    "rmsnorm_backward_4096": lambda make: rmsnorm_backward(make, 32768, 4096, False),
    "cross_entropy_backward": lambda make: cross_entropy_backward(make, 8192, 32768),
    "softmax_backward_32768": lambda make: softmax_backward(make, 8192, 32768),
    "cross_entropy_forward": lambda make: cross_entropy_forward(make, 8192, 32768),
    "rmsnorm_backward_16384": lambda make: rmsnorm_backward(make, 8192, 16384, False),
    "add_rmsnorm_backward_4096": lambda make: rmsnorm_backward(make, 32768, 4096, True),
    "rope": lambda make: rope_forward(make, 32, 4096),
    "silu_forward": lambda make: silu_problem(make, 16384, 11008, False),
    "silu_backward": lambda make: silu_problem(make, 16384, 11008, True),
    "embedding_forward": lambda make: embedding_forward(make, 32768, 4096),
    "embedding_backward": lambda make: embedding_backward(make, 32768, 4096),
    "softmax_forward_16384": lambda make: softmax_forward(make, 16384, 16384),
    "softmax_backward_16384": lambda make: softmax_backward(make, 16384, 16384),
    "softmax_forward_4096": lambda make: softmax_forward(make, 32768, 4096),
    "softmax_backward_4096": lambda make: softmax_backward(make, 32768, 4096),
    "rmsnorm_forward_4096": lambda make: rmsnorm_forward(make, 32768, 4096),
    "rmsnorm_forward_16384": lambda make: rmsnorm_forward(make, 8192, 16384),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.compile and options.share >= 0:
        compile_share(options)
        return 0
    started = time.monotonic()
    if not INTERPRETING:
        compile_everything(options)
        print(f"compiled after {time.monotonic() - started:.1f} s", flush=True)
        if options.compile:
            return 0
    device = "cpu" if INTERPRETING else "cuda"
    bandwidth = copy_bandwidth() if device == "cuda" else 0.0
    deadline = time.monotonic() + options.seconds
    best: dict[str, tuple[float, str]] = {}
    for name, problem in wanted_problems(options, device):
        if time.monotonic() > deadline:
            print(f"{name}: not timed, {options.seconds:.0f} seconds are over", flush=True)
            continue
        best[name] = try_all(problem, bandwidth, options.output)
    if device == "cuda":
        for name, (microseconds, variant) in best.items():
            print(f"best {name}: {microseconds:.1f} us: {variant}", flush=True)
        if time.monotonic() < deadline + 4:
            whole_path(options)
        print(f"all after {time.monotonic() - started:.1f} s", flush=True)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="only problems whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=28.0, help="start no problem after this long on the GPU")
    parser.add_argument("--processes", type=int, default=14, help="that compile")
    parser.add_argument("--output", type=Path, help="JSON lines file that rows are appended to")
    parser.add_argument("--compile", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes in the interpreter")
    parser.add_argument("--share", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def wanted_problems(options: argparse.Namespace, device: str) -> Iterator[tuple[str, Problem]]:
    for name, problem in PROBLEMS.items():
        if any(part in name for part in options.only):
            yield name, problem(Maker(device))


def compile_everything(options: argparse.Namespace) -> None:
    """In processes that see no GPU; Triton's cache is left full."""
    command = [sys.executable, __file__, "--compile", "--processes", str(options.processes), "--only", *options.only]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, "--share", str(share)], env=environment) for share in range(options.processes)
    ]
    for process in running:
        process.wait()


def compile_share(options: argparse.Namespace) -> None:
    from cs336_triton.cross_compilation import CARDS, compile_launch

    number = 0
    seen = set()
    for name, problem in wanted_problems(options, "meta"):
        for variant, launches in problem.variants.items():
            for one in launches:
                key = (name, one.kernel.fn.__name__, str(sorted(one.keywords.items(), key=lambda item: item[0])))
                if key in seen:
                    continue
                seen.add(key)
                number += 1
                if number % options.processes != options.share:
                    continue
                try:
                    made = compile_launch(one, CARDS[90])
                except Exception as error:
                    print(f"{name}: {variant}: {type(error).__name__}: {str(error)[:120]!r}", flush=True)
                    continue
                asked = f"{made.registers} registers, {made.local_memory} spilled, {made.shared_memory} shared"
                print(f"{name}: {one.kernel.fn.__name__}: {variant}: {asked}", flush=True)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read plus written."""
    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), calls=4, rounds=5)
    print(f"copy {2 * source.numel() / seconds / 1e12:.3f} TB/s", flush=True)
    half = source[: 2**28]
    small = seconds_of(lambda: target[: 2**28].copy_(half), calls=8, rounds=5)
    print(f"copy of 256 MiB {2 * half.numel() / small / 1e12:.3f} TB/s", flush=True)
    return 2 * source.numel() / seconds


def seconds_of(call: Callable[[], Any], calls: int, rounds: int) -> float:
    """Median seconds of a call, several of them in one CUDA graph: the host has no part in it."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    timed = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        timed.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in timed) / 1e3 / calls


def try_all(problem: Problem, bandwidth: float, output: Path | None) -> tuple[float, str]:
    best = (float("inf"), "none")
    for variant, launches in problem.variants.items():

        def run(launches=launches) -> None:
            for one in launches:
                launch(one.kernel, one.grid, *one.arguments, **one.keywords)

        try:
            for tensor in problem.outputs:
                tensor.fill_(float("nan"))
            if "after zeros" in variant:
                problem.outputs[0].zero_()
            run()
            wrong = max(error_of(found, truth) for found, truth in problem.expected())
            bad = wrong > problem.tolerance or not all(bool(x.isfinite().all()) for x in problem.outputs)
            verdict = f" WRONG by {wrong:.3g}" if bad else ""
            if bandwidth:
                microseconds = seconds_of(run, calls=6, rounds=5) * 1e6
                share = problem.moved / microseconds * 1e6 / bandwidth
                if not bad:
                    best = min(best, (microseconds, variant))
                print(f"{problem.name}: {microseconds:7.1f} us {share:6.1%} {variant}{verdict}", flush=True)
                row = {"problem": problem.name, "variant": variant, "us": microseconds, "share": share, "wrong": bad}
                if output is not None:
                    with output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            else:
                print(f"{problem.name}: {variant}{verdict or ' right'}", flush=True)
        except Exception as error:
            print(f"{problem.name}: {variant}: {type(error).__name__}: {str(error)[:150]!r}", flush=True)
    return best


def error_of(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference over what is largest of the truth's magnitude at that place and its mean magnitude."""
    scale = truth.abs().clamp(min=float(truth.abs().mean()) + 1e-30)
    difference = ((found.float() - truth).abs() / scale).max()
    return float(difference) if bool(difference.isfinite()) else float("inf")


def whole_path(options: argparse.Namespace) -> None:
    """Backward (and both) through autograd: time on the GPU's clock, and the host's time of a call."""
    make = Maker("cuda")
    x = make.normal(32768, 4096)
    square = make.normal(8192, 32768)
    q, k = make.normal(4, 32, 4096, 128), make.normal(4, 32, 4096, 128)
    cos, sin = (torch.randn(4096, 64, device="cuda") for _ in range(2))
    targets = targets_of(make, 8192, 32768)
    weight = make.normal(4096)
    calls: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
        "rmsnorm": (rmsnorm.rmsnorm, (x, weight)),
        "add_rmsnorm": (lambda a, b: add_rmsnorm.add_rmsnorm(a, a, b), (x, weight)),
        "rope": (lambda a, b: rope.rope(a, b, cos, sin), (q, k)),
        "softmax": (softmax.softmax, (square,)),
        "softmax_4096": (softmax.softmax, (x,)),
        "cross_entropy": (lambda a: cross_entropy.cross_entropy(a, targets), (square,)),
    }
    for name, (function, tensors) in calls.items():
        if not any(part in name or name in part for part in options.only):
            continue
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]

        def run(function=function, leaves=leaves) -> tuple[Any, ...]:
            results = function(*leaves)
            return results if isinstance(results, tuple) else (results,)

        kept = run()
        grads = [torch.randn_like(result) for result in kept]

        def forward(run=run) -> None:
            with torch.no_grad():
                run()

        def backward(kept=kept, leaves=leaves, grads=grads) -> None:
            torch.autograd.grad(kept, leaves, grads, retain_graph=True)

        def both(run=run, leaves=leaves, grads=grads) -> None:
            torch.autograd.grad(run(), leaves, grads)

        for direction, call in (("forward", forward), ("backward", backward), ("both", both)):
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            count = 20
            begin.record()
            start = time.perf_counter()
            for _ in range(count):
                call()
            host = (time.perf_counter() - start) / count * 1e6
            end.record()
            torch.cuda.synchronize()
            device = begin.elapsed_time(end) / count * 1e3
            print(f"whole path {name} {direction}: {device:.1f} us a call, the host alone {host:.1f} us", flush=True)
        del kept, grads, leaves


if __name__ == "__main__":
    sys.exit(main())
