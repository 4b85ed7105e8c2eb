"""Dequantizing planes: a whole tensor for the matmuls of many rows, or only the rows of some tokens. One kernel for both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.triton_kernels import decode
from ollamapy.triton_kernels.forms import GROUP
from ollamapy.triton_kernels.layout import Planes

TILE_ROWS, TILE_GROUPS = 4, 64


@triton.jit
def dequantize_kernel(
    low,
    high,
    scales,
    d,
    m,
    picked,
    out,
    num_rows,
    groups,
    PICK: tl.constexpr,
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
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """out (num_rows, K): the rows of the planes, or with PICK their rows `picked`."""
    target = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = (target < num_rows)[:, None, None] & (group < groups)[None, :, None]
    row = tl.minimum(target, num_rows - 1)
    if PICK:
        row = tl.load(picked + row)
    near = tl.minimum(group, groups - 1)[None, :]
    first, second = decode.weights(
        low, high, scales, d, m, row[:, None], near, groups, LOW, HIGH, OFFSET, SCALE, SCALE_OFFSET, MIN, T0, T1, T2, T3
    )
    at = out + ((target * groups)[:, None] + group[None, :])[:, :, None] * 32 + tl.arange(0, 16)[None, None, :]
    tl.store(at, first.to(out.dtype.element_ty), inside)
    tl.store(at + 16, second.to(out.dtype.element_ty), inside)


def _launch(planes: Planes, picked: Tensor | None, out: Tensor) -> Tensor:
    assert planes.form is not None and out.is_contiguous()
    groups = out.shape[-1] // GROUP
    grid = (triton.cdiv(out.shape[0], TILE_ROWS), triton.cdiv(groups, TILE_GROUPS))
    dequantize_kernel[grid](
        **decode.pointers(planes),
        picked=out if picked is None else picked,
        out=out,
        num_rows=out.shape[0],
        groups=groups,
        PICK=picked is not None,
        **decode.constants(planes.form),
        ROWS=TILE_ROWS,
        GROUPS=min(TILE_GROUPS, triton.next_power_of_2(groups)),
    )
    return out


def dequantize(planes: Planes, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """All values, (..., N, K)."""
    if planes.form is None:
        return planes.low.view(planes.shape).to(dtype)
    out = torch.empty(planes.rows, planes.shape[-1], dtype=dtype, device=planes.low.device)
    return _launch(planes, None, out).view(planes.shape)


def embedding(token_ids: Tensor, weight: Planes) -> Tensor:
    """(n,) int64 -> (n, E) float32. Reads and decodes only the rows that are asked for."""
    if weight.form is None:
        return weight.low[token_ids].float()
    out = torch.empty(token_ids.shape[0], weight.shape[-1], dtype=torch.float32, device=weight.low.device)
    return _launch(weight, token_ids, out) if out.numel() else out
