"""y = x W^T with activations quantized to int8 per 32 (`norm.quantize`): sums of a group are exact integers.

Each group's sum is scaled and added in float32, two groups at a time, in the order of K, and K is split by the shape of W
alone. So a row's result is the same bits for any number of rows beside it, as it is on the CPU. x is laid out as the codes come
apart: weight j of half h at 2 j + h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.triton_kernels import decode, tuning
from ollamapy.triton_kernels.forms import GROUP
from ollamapy.triton_kernels.layout import Planes
from ollamapy.triton_kernels.norm import Quantized


@triton.jit
def int8_kernel(
    x,
    x_steps,
    x_sums,
    low,
    high,
    scales,
    d,
    m,
    out,
    bias,
    rows,
    columns,
    groups,
    span,
    out_stride,
    SPLIT: tl.constexpr,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out (rows, columns), or with SPLIT (splits, rows, columns) float32 without its end. Products are batched by group."""
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    weight_row = tl.minimum(column, columns - 1)
    live = place < rows
    source = tl.minimum(place, rows - 1).to(tl.int64)
    k = tl.arange(0, 32)
    lane = tl.arange(0, GROUPS)
    acc = tl.zeros((BM, BN), tl.float32)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, groups)
    for base in tl.range(start, stop, GROUPS, num_stages=STAGES):
        group = base + lane
        near = group if EVEN else tl.minimum(group, groups - 1)
        seen = live[None, :] & (group < stop)[:, None]
        at = source[None, :] * groups + near[:, None]
        values = tl.load(x + at[:, :, None] * 32 + k[None, None, :], seen[:, :, None], other=0)
        step = tl.load(x_steps + at, seen, other=0.0)[:, :, None]
        row = weight_row[:, None]
        first, second = decode.codes(low, high, row * groups + near[None, :], LOW, HIGH, OFFSET, T0, T1, T2, T3)
        both = tl.reshape(tl.join(first.to(tl.int8), second.to(tl.int8)), (BN, GROUPS, 32))
        weights = tl.permute(both, (1, 2, 0))
        scale0, scale1, min0, min1 = decode.group_scales(scales, d, m, row, near[None, :], groups, SCALE, SCALE_OFFSET, MIN)
        scale0 = tl.trans(scale0)[:, None, :]
        if TWO:
            scale1 = tl.trans(scale1)[:, None, :]
            even = (k % 2 == 0)[None, None, :]
            near0 = tl.dot(tl.where(even, values, 0).to(tl.int8), weights).to(tl.float32)
            near1 = tl.dot(tl.where(even, 0, values).to(tl.int8), weights).to(tl.float32)
            parts = (near0 * scale0 + near1 * scale1) * step
        else:
            parts = tl.dot(values, weights).to(tl.float32) * scale0 * step
        if MIN != 0:
            sum0 = tl.load(x_sums + at * 2, seen, other=0.0)[:, :, None]
            sum1 = tl.load(x_sums + at * 2 + 1, seen, other=0.0)[:, :, None]
            parts += sum0 * tl.trans(min0)[:, None, :] + sum1 * tl.trans(min1)[:, None, :]
        acc += tl.sum(parts, 0)
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


def splits_of(columns: int, most: int, groups: int, tile: tuning.Tile) -> tuple[int, int]:
    """How often K is split, and groups per split: by the shape of W alone."""
    wanted = max(min(most // triton.cdiv(columns, tile.columns), groups // (8 * tile.groups)), 1)
    span = triton.cdiv(triton.cdiv(groups, wanted), tile.groups) * tile.groups
    return triton.cdiv(groups, span), span


def launch(x: Quantized, weight: Planes, out: Tensor, bias: Tensor | None, add: bool) -> Tensor:
    """The product into `out` (n, N), or onto it with `add`; where K is split its parts (splits, n, N) float32 instead."""
    assert weight.form is not None and out.stride(1) == 1
    rows, columns, groups = x.codes.shape[0], out.shape[1], weight.shape[-1] // GROUP
    table = tuning.of_weight(weight)
    tile = table.int8_tile(rows)
    splits, span = splits_of(columns, table.programs, groups, tile)
    parts = out if splits == 1 else torch.empty(splits, rows, columns, dtype=torch.float32, device=out.device)
    int8_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns), splits)](
        *x,
        **decode.pointers(weight),
        out=parts,
        bias=out if bias is None else bias,
        rows=rows,
        columns=columns,
        groups=groups,
        span=span,
        out_stride=out.stride(0),
        SPLIT=splits > 1,
        BIAS=bias is not None,
        ADD=add,
        EVEN=groups % tile.groups == 0,
        **decode.constants(weight.form),
        BM=tile.rows,
        BN=tile.columns,
        GROUPS=tile.groups,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return parts
