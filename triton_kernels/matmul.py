"""y = x W^T on packed weights: matvec, tiles with dequantization in registers, or a whole layer to bfloat16 for many rows.

All three read the one copy of a weight (see `layout`). What is launched for which shape is the table `choose_path` and
`TILES`; nothing is tuned at a user's start. Float types go through torch. Sums over K that several programs share are
added in the order of K, so a result never depends on which program was first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.quant.tensor import QuantTensor
from ollamapy.triton_kernels import decode
from ollamapy.triton_kernels.embedding import dequantize
from ollamapy.triton_kernels.layout import GROUP, Planes, pack

MATVEC_ROWS = 4  # most rows of x that the matvec kernel takes
DENSE_ROWS = 256  # from here on, decoding a layer costs less than a fused kernel loses to a dense matmul
PROGRAMS = 264  # two for each multiprocessor of an H100: below that, K is split


class Tile(NamedTuple):
    """Of the tile kernel: rows of x, rows of W, groups of K at a time, and how it is compiled."""

    rows: int
    columns: int
    groups: int
    num_warps: int
    num_stages: int


MATVEC = Tile(MATVEC_ROWS, 8, 32, 4, 1)  # 16 columns: twice the loads in flight, but Q6_K spills on sm_120
TILES: tuple[Tile, ...] = (Tile(16, 32, 4, 4, 3), Tile(32, 64, 4, 4, 3), Tile(64, 64, 2, 4, 3), Tile(128, 128, 2, 8, 3))
"""By rows of x: the first that holds them all, else the last."""


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
def matvec_kernel(
    x,
    low,
    high,
    scales,
    d,
    m,
    out,
    columns,
    groups,
    span,
    M: tl.constexpr,
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
    """out (splits, M, columns) float32. A program has BN columns (rows of W) and the groups from program_id(1) * span on.

    A thread holds whole halves of groups, so that sums over 16 weights stay in its registers. That rests on the order of
    loads: the compiler lays the products out as it lays out the last of their operands to be loaded, which must be the codes
    (x last: 276 shuffles in the loop for Q4_K on sm_90; now none).
    """
    column = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    row = tl.minimum(column, columns - 1)[:, None]
    lane = tl.arange(0, GROUPS)
    acc0 = tl.zeros((BN, GROUPS), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    start = tl.program_id(1) * span
    stop = tl.minimum(start + span, groups)
    for base in tl.range(start, stop, GROUPS, num_stages=1):
        group = base + lane
        near = group if EVEN else tl.minimum(group, groups - 1)
        live = group < stop
        x0, x1 = _x_halves(x, 0, near, live, groups)
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
    at = out + (tl.program_id(1) * M).to(tl.int64) * columns + column
    tl.store(at, tl.sum(acc0, 1), column < columns)
    if M > 1:
        tl.store(at + columns, tl.sum(acc1, 1), column < columns)
    if M > 2:
        tl.store(at + 2 * columns, tl.sum(acc2, 1), column < columns)
    if M > 3:
        tl.store(at + 3 * columns, tl.sum(acc3, 1), column < columns)


@triton.jit
def matmul_kernel(
    x,
    low,
    high,
    scales,
    d,
    m,
    out,
    row_of,
    expert_of,
    rows,
    columns,
    groups,
    span,
    ROUTED: tl.constexpr,
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
    """out (splits, rows, columns) in its type. Weights are decoded in registers and rounded to DOT, as x is.

    The two halves of the groups are two products: nothing is interleaved. ROUTED: a tile has the rows row_of[tile * BM ...] of
    x (-1: none) and the weights of expert_of[tile]; out then has one row for each entry of row_of.
    """
    tile = tl.program_id(0)
    place = tile * BM + tl.arange(0, BM)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    weight_row = tl.minimum(column, columns - 1)
    if ROUTED:
        source = tl.load(row_of + place)
        live = source >= 0
        source = tl.maximum(source, 0).to(tl.int64)
        weight_row += tl.load(expert_of + tile).to(tl.int64) * columns
    else:
        live = place < rows
        source = tl.minimum(place, rows - 1).to(tl.int64)
    k = tl.arange(0, GROUPS * 16)
    offset_k = (k // 16) * 32 + k % 16
    lane = tl.arange(0, GROUPS)
    acc = tl.zeros((BM, BN), tl.float32)
    start = tl.program_id(2) * span
    stop = tl.minimum(start + span, groups)
    for base in tl.range(start, stop, GROUPS, num_stages=STAGES):
        group = base + lane
        near = group if EVEN else tl.minimum(group, groups - 1)
        seen = live[:, None] if EVEN else live[:, None] & (base + k // 16 < stop)[None, :]
        at_x = x + source[:, None] * (groups * 32) + (base * 32 + offset_k)[None, :]
        x0 = tl.load(at_x, seen, other=0.0).to(DOT)
        x1 = tl.load(at_x + 16, seen, other=0.0).to(DOT)
        first, second = decode.weights(
            *(low, high, scales, d, m, weight_row[:, None], near[None, :], groups),
            *(LOW, HIGH, OFFSET, SCALE, SCALE_OFFSET, MIN, T0, T1, T2, T3),
        )
        w0 = tl.reshape(first.to(DOT), (BN, GROUPS * 16))
        w1 = tl.reshape(second.to(DOT), (BN, GROUPS * 16))
        acc = tl.dot(x0, tl.trans(w0), acc, input_precision="ieee")
        acc = tl.dot(x1, tl.trans(w1), acc, input_precision="ieee")
    target = tl.program_id(2).to(tl.int64) * rows + place
    inside = (place < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + target[:, None] * columns + column[None, :], acc.to(out.dtype.element_ty), inside)


DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _splits(programs: int, groups: int, step: int) -> tuple[int, int]:
    """How often K is split, and groups per split: whole steps, and at least four of them."""
    wanted = max(min(PROGRAMS // programs, groups // (4 * step)), 1)
    span = triton.cdiv(triton.cdiv(groups, wanted), step) * step
    return triton.cdiv(groups, span), span


def _sum(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts[0].to(dtype) if parts.shape[0] == 1 else parts.sum(0).to(dtype)


def tile_for(rows: int) -> Tile:
    return next((tile for tile in TILES if rows <= tile.rows), TILES[-1])


def matvec(x: Tensor, weight: Planes) -> Tensor:
    """At most MATVEC_ROWS rows, in float32: exact up to the rounding of sums."""
    assert weight.form is not None and x.shape[0] <= MATVEC_ROWS
    rows, columns, groups = x.shape[0], weight.shape[-2], weight.shape[-1] // GROUP
    tile = MATVEC
    step = min(tile.groups, triton.next_power_of_2(groups))
    programs = triton.cdiv(columns, tile.columns)
    splits, span = _splits(programs, groups, step)
    out = torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device)
    matvec_kernel[(programs, splits)](
        x,
        **decode.pointers(weight),
        out=out,
        columns=columns,
        groups=groups,
        span=span,
        M=rows,
        EVEN=groups % step == 0,
        **decode.constants(weight.form),
        BN=tile.columns,
        GROUPS=step,
        num_warps=tile.num_warps,
    )
    return _sum(out, x.dtype)


def matmul(x: Tensor, weight: Planes, dot: torch.dtype = torch.bfloat16) -> Tensor:
    """Any number of rows, through tensor cores: x and the decoded weights are rounded to `dot`, sums are float32."""
    assert weight.form is not None
    rows, columns, groups = x.shape[0], weight.shape[-2], weight.shape[-1] // GROUP
    tile = tile_for(rows)
    step = min(tile.groups, triton.next_power_of_2(groups))
    grid = triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)
    splits, span = _splits(grid[0] * grid[1], groups, step)
    out = torch.empty(splits, rows, columns, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    matmul_kernel[(*grid, splits)](
        x,
        **decode.pointers(weight),
        out=out,
        row_of=x,
        expert_of=x,
        rows=rows,
        columns=columns,
        groups=groups,
        span=span,
        ROUTED=False,
        DOT=DOT_TYPES[dot],
        EVEN=groups % step == 0,
        **decode.constants(weight.form),
        BM=tile.rows,
        BN=tile.columns,
        GROUPS=step,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return _sum(out, x.dtype)


def choose_path(rows: int, weight: Planes) -> str:
    """ "dense" | "matvec" | "tiles" | "layer" for a number of rows of x."""
    if weight.form is None:
        return "dense"
    if rows <= MATVEC_ROWS:
        return "matvec"
    return "tiles" if rows < DENSE_ROWS else "layer"


def prepare_linear(weight: QuantTensor, device: torch.device) -> Planes:
    """Packed on the device, a chunk of rows at a time."""
    return pack(weight.to(device))


def linear(x: Tensor, weight: Planes, bias: Tensor | None = None) -> Tensor:
    """(n, K) x (N, K) + (N) -> (n, N) in x's type."""
    x = x.contiguous()
    path = choose_path(x.shape[0], weight) if x.shape[0] else "dense"
    if path == "matvec":
        out = matvec(x, weight)
    elif path == "tiles":
        out = matmul(x, weight)
    else:
        dense = dequantize(weight) if path == "layer" else weight.low
        out = torch.matmul(x.to(dense.dtype), dense.t()).to(x.dtype) if x.shape[0] else x.new_zeros(0, weight.shape[-2])
    return out if bias is None else out.add_(bias)
