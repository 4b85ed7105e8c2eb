"""Kernels of y = x W^T on packed weights (see `layout`): matvec, tiles with dequantization in registers, and the end of both.

An end adds a bias, a residual stream, or joins gate and up. Sums over K that several programs share are added in the order of
K, so a result never depends on which program was first. `linear` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ollamapy.triton_kernels import decode
from ollamapy.triton_kernels.activation import gate_times_up


@triton.jit
def _x_halves(x, token, near, live, groups):
    """Row `token` of x at the groups `near`: both halves, (1, G, 16) float32."""
    at = x + (token * groups + near)[None, :, None] * 32 + tl.arange(0, 16)[None, None, :]
    x0 = tl.load(at, live[None, :, None], other=0.0).to(tl.float32)
    x1 = tl.load(at + 16, live[None, :, None], other=0.0).to(tl.float32)
    return x0, x1


@triton.jit
def _group_dots(x0, x1, first, second, scale0, scale1, min0, min1, TWO: tl.constexpr, MIN: tl.constexpr):
    """Dot products of groups, (BN, G): a scale enters once for its weights, a min once for the sum of its x."""
    if TWO:
        dots = scale0 * tl.sum(first * x0, 2) + scale1 * tl.sum(second * x1, 2)
    else:
        dots = scale0 * tl.sum(first * x0 + second * x1, 2)
    if MIN != 0:
        dots += min0 * tl.sum(x0, 2) + min1 * tl.sum(x1, 2)
    return dots


@triton.jit
def _end(
    value,
    token,
    out,
    bias,
    columns,
    out_stride,
    M: tl.constexpr,
    SPLIT: tl.constexpr,
    USED: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    BN: tl.constexpr,
):
    """Stores one row (BN,) of a matvec. Parts of gated sums lie as the rows of W do: those of up after all of gate."""
    n = tl.arange(0, BN)
    if USED != 0:
        token = tl.program_id(2)
    if SPLIT:
        if GATE != 0:
            at = tl.program_id(0) * (BN // 2) + n // 2
            width = 2 * columns
            place = at + (n % 2) * columns
        else:
            at = tl.program_id(0) * BN + n
            width = columns
            place = at
        rows = M if USED == 0 else tl.num_programs(2)
        tl.store(out + (tl.program_id(1) * rows + token).to(tl.int64) * width + place, value, at < columns)
    else:
        if GATE != 0:
            gate, up = tl.split(tl.reshape(value, (BN // 2, 2)))
            value = gate_times_up(gate, up, GATE == 2)
            at = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        else:
            at = tl.program_id(0) * BN + n
        if BIAS:
            value += tl.load(bias + at, at < columns, other=0.0).to(tl.float32)
        target = out + tl.cast(token, tl.int64) * out_stride + at
        if ADD:
            value += tl.load(target, at < columns, other=0.0).to(tl.float32)
        tl.store(target, value.to(out.dtype.element_ty), at < columns)


@triton.jit
def end_kernel(
    parts,
    out,
    bias,
    rows,
    columns,
    out_stride,
    SPLITS: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    SIZE: tl.constexpr,
):
    """out (rows, columns): the sum of parts (SPLITS, rows, columns, or twice as many with GATE) in order, and its end."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    live = at < columns
    width = 2 * columns if GATE != 0 else columns
    value = tl.zeros((SIZE,), tl.float32)
    for split in range(SPLITS):
        value += tl.load(parts + (split * rows + row) * width + at, live, other=0.0)
    if GATE != 0:
        up = tl.zeros((SIZE,), tl.float32)
        for split in range(SPLITS):
            up += tl.load(parts + (split * rows + row) * width + columns + at, live, other=0.0)
        value = gate_times_up(value, up, GATE == 2)
    if BIAS:
        value += tl.load(bias + at, live, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(out + row * out_stride + at, live, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, value.to(out.dtype.element_ty), live)


@triton.jit
def matvec_kernel(
    x,
    low,
    high,
    scales,
    d,
    m,
    out,
    bias,
    expert_of,
    columns,
    groups,
    span,
    out_stride,
    up_rows,
    M: tl.constexpr,
    SPLIT: tl.constexpr,
    USED: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    MIN: tl.constexpr,
    TWO: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out (M, columns), or with SPLIT (splits, M, columns) float32 without its end. A program has BN rows of W and the groups
    from program_id(1) * span on.

    GATE (1: silu, 2: gelu): W has the rows of gate and, `up_rows` later, those of up; every second of the BN is one of up.
    USED: program_id(2) is a place of `expert_of`, whose expert's rows are taken with row place // USED of x; 0: no experts.
    A thread holds whole halves of groups, so that sums over 16 weights stay in its registers. That rests on the order of
    loads: the compiler lays the products out as it lays out the last of their operands to be loaded, which must be the codes
    (x last: 276 shuffles in the loop for Q4_K on sm_90; now none).
    """
    n = tl.arange(0, BN)
    if GATE != 0:
        row = tl.minimum(tl.program_id(0).to(tl.int64) * (BN // 2) + n // 2, columns - 1) + (n % 2) * up_rows
    else:
        row = tl.minimum(tl.program_id(0).to(tl.int64) * BN + n, columns - 1)
    token = 0
    if USED != 0:
        row += tl.load(expert_of + tl.program_id(2)).to(tl.int64) * columns
        token = tl.program_id(2).to(tl.int64) // USED
    row = row[:, None]
    lane = tl.arange(0, GROUPS)
    acc0 = tl.zeros((BN, GROUPS), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, groups)
    for base in tl.range(start, stop, GROUPS, num_stages=1):
        group = base + lane
        near = group if EVEN else tl.minimum(group, groups - 1)
        live = group < stop
        x0, x1 = _x_halves(x, token, near, live, groups)
        if M > 1:
            y0, y1 = _x_halves(x, 1, near, live, groups)
        if M > 2:
            z0, z1 = _x_halves(x, 2, near, live, groups)
        if M > 3:
            u0, u1 = _x_halves(x, 3, near, live, groups)
        near = near[None, :]
        first, second = decode.halves(low, high, row * groups + near, LOW, HIGH, OFFSET, T0, T1, T2, T3)
        scale0, scale1, min0, min1 = decode.group_scales(scales, d, m, row, near, groups, SCALE, SCALE_OFFSET, MIN)
        acc0 += _group_dots(x0, x1, first, second, scale0, scale1, min0, min1, TWO, MIN)
        if M > 1:
            acc1 += _group_dots(y0, y1, first, second, scale0, scale1, min0, min1, TWO, MIN)
        if M > 2:
            acc2 += _group_dots(z0, z1, first, second, scale0, scale1, min0, min1, TWO, MIN)
        if M > 3:
            acc3 += _group_dots(u0, u1, first, second, scale0, scale1, min0, min1, TWO, MIN)
    _end(tl.sum(acc0, 1), 0, out, bias, columns, out_stride, M, SPLIT, USED, GATE, BIAS, ADD, BN)
    if M > 1:
        _end(tl.sum(acc1, 1), 1, out, bias, columns, out_stride, M, SPLIT, USED, GATE, BIAS, ADD, BN)
    if M > 2:
        _end(tl.sum(acc2, 1), 2, out, bias, columns, out_stride, M, SPLIT, USED, GATE, BIAS, ADD, BN)
    if M > 3:
        _end(tl.sum(acc3, 1), 3, out, bias, columns, out_stride, M, SPLIT, USED, GATE, BIAS, ADD, BN)


@triton.jit
def matmul_kernel(
    x,
    low,
    high,
    scales,
    d,
    m,
    out,
    bias,
    row_of,
    expert_of,
    rows,
    columns,
    groups,
    span,
    out_stride,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    USED: tl.constexpr,
    DOT: tl.constexpr,
    EVEN: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    MIN: tl.constexpr,
    TWO: tl.constexpr,
    T0: tl.constexpr,
    T1: tl.constexpr,
    T2: tl.constexpr,
    T3: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (rows, columns), or with SPLIT (splits, rows, columns) float32 without its end. Weights are decoded in registers and
    rounded to DOT, as x is.

    The halves of a group are joined in registers, so that there is one product: of two, one after the other, the compiler gives
    each warp of mma.sync all columns, and then has each decode all weights (or spills: 384 bytes for MXFP4 on sm_80). USED, if
    not 0: a tile has the pairs row_of[tile * BM ...] (-1: none) and the weights of expert_of[tile]; a pair's row of x is
    pair // USED, its row of out pair.
    """
    tile = tl.program_id(0)
    place = tile * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    weight_row = tl.minimum(column, columns - 1)
    if USED != 0:
        place = tl.load(row_of + place)
        live = place >= 0
        source = tl.maximum(place, 0).to(tl.int64) // USED
        weight_row += tl.load(expert_of + tile).to(tl.int64) * columns
    else:
        live = place < rows
        source = tl.minimum(place, rows - 1).to(tl.int64)
    k = tl.arange(0, GROUPS * 32)
    lane = tl.arange(0, GROUPS)
    acc = tl.zeros((BM, BN), tl.float32)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, groups)
    for base in tl.range(start, stop, GROUPS, num_stages=STAGES):
        group = base + lane
        near = group if EVEN else tl.minimum(group, groups - 1)
        seen = live[:, None] if EVEN else live[:, None] & (base + k // 32 < stop)[None, :]
        at_x = x + source[:, None] * (groups * 32) + (base * 32 + k)[None, :]
        rows_x = tl.load(at_x, seen, other=0.0).to(DOT)
        first, second = decode.weights(
            *(low, high, scales, d, m, weight_row[:, None], near[None, :], groups),
            *(LOW, HIGH, OFFSET, SCALE, SCALE_OFFSET, MIN, T0, T1, T2, T3),
        )
        both = tl.permute(tl.join(first.to(DOT), second.to(DOT)), (0, 1, 3, 2))
        acc = tl.dot(rows_x, tl.trans(tl.reshape(both, (BN, GROUPS * 32))), acc, input_precision="ieee")
    inside = live[:, None] & (column < columns)[None, :]
    if SPLIT:
        target = tl.program_id(2).to(tl.int64) * rows + place
        tl.store(out + target[:, None] * columns + column[None, :], acc, inside)
    else:
        if BIAS:
            acc += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)[None, :]
        target = out + place.to(tl.int64)[:, None] * out_stride + column[None, :]
        if ADD:
            acc += tl.load(target, inside, other=0.0).to(tl.float32)
        tl.store(target, acc.to(out.dtype.element_ty), inside)
