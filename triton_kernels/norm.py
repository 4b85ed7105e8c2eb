"""RMSNorm and LayerNorm over the last dimension, with what comes before (the residual sum, a norm of the branch) and after
(quantization to int8). One program for each row."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.triton_kernels.forms import GROUP


@triton.jit
def round_even(x):
    """To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def norm_kernel(
    x,
    residual,
    post,
    weight,
    bias,
    out,
    steps,
    sums,
    width,
    eps,
    POST: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    CENTRE: tl.constexpr,
    BIAS: tl.constexpr,
    QUANT: tl.constexpr,
    PADDED: tl.constexpr,
):
    """out = norm(x) * weight + bias. Before it, with POST, x = norm(x) * post; with ADD, residual += x, and that is normed.

    QUANT: out is int8, its steps (rows, width / 32) and sums of the quantized halves of groups (rows, width / 32, 2), float32;
    weight j of half h of a group is at 2 j + h, as the int8 matmul reads it. The step of a group with a value that is not
    finite is NaN: no code says so.
    """
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, PADDED)
    live = i < width
    value = tl.load(x + row + i, live, other=0.0).to(tl.float32)
    if POST:
        value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps) * tl.load(post + i, live, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + i, live, other=0.0).to(tl.float32)
        tl.store(residual + row + i, value.to(residual.dtype.element_ty), live)
    if NORM:
        if CENTRE:
            value = tl.where(live, value - tl.sum(value, 0) / width, 0.0)
        value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps)
        value *= tl.load(weight + i, live, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + i, live, other=0.0).to(tl.float32)
    if QUANT:
        groups: tl.constexpr = PADDED // 32
        parts = tl.reshape(value, (groups, 2, 16))
        finite = tl.abs(parts) < float("inf")
        parts = tl.where(finite, parts, 0.0)
        most = tl.max(tl.max(tl.abs(parts), 2), 1)
        inverse = 127.0 / tl.where(most > 0.0, most, 1.0)
        codes = round_even(parts * inverse[:, None, None])
        most = tl.where(tl.min(tl.min(finite.to(tl.int32), 2), 1) != 0, most, float("nan"))
        g = tl.arange(0, groups)
        inside = g < width // 32
        at = tl.program_id(0).to(tl.int64) * (width // 32) + g
        step = most / 127.0
        tl.store(steps + at, step, inside)
        half = tl.arange(0, 2)
        total = tl.sum(codes, 2) * step[:, None]
        tl.store(sums + at[:, None] * 2 + half[None, :], total, inside[:, None])
        j = tl.arange(0, 16)
        place = out + at[:, None, None] * 32 + half[None, :, None] + 2 * j[None, None, :]
        tl.store(place, codes.to(tl.int8), inside[:, None, None])
    elif NORM:
        tl.store(out + row + i, value.to(out.dtype.element_ty), live)


class Quantized(NamedTuple):
    """Rows (n, K) as int8 per 32: see `norm_kernel`."""

    codes: Tensor  # (n, K) int8
    steps: Tensor  # (n, K / 32) float32
    sums: Tensor  # (n, K / 32, 2) float32: of the codes of the halves, times the step


def _launch(
    x: Tensor,
    out: Tensor | Quantized | None,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    post: Tensor | None = None,
    centre: bool = False,
) -> None:
    width = x.shape[-1]
    if not x.numel():
        return
    quantized = isinstance(out, Quantized)
    target, steps, sums = out if isinstance(out, Quantized) else (x if out is None else out,) * 3
    padded = triton.next_power_of_2(max(width, GROUP))
    absent = x
    norm_kernel[(x.numel() // width,)](
        x,
        *(absent if tensor is None else tensor for tensor in (residual, post, weight, bias)),
        *(target, steps, sums, width, eps),
        POST=post is not None,
        ADD=residual is not None,
        NORM=weight is not None,
        CENTRE=centre,
        BIAS=bias is not None,
        QUANT=quantized,
        PADDED=padded,
        num_warps=min(max(padded // 512, 1), 16),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in x's type or another."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=dtype)
    _launch(x, out, eps, weight)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch(x, out, eps, weight, bias, centre=True)
    return out


def add_norm(
    x: Tensor, residual: Tensor, eps: float, weight: Tensor | None, post: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """residual (contiguous) += x, or with `post` += rms_norm(x) * post; then `rms_norm` of that sum. Without `weight`: the sum
    alone."""
    assert residual.is_contiguous() and x.is_contiguous() and residual.shape == x.shape
    out = torch.empty_like(x, dtype=dtype) if weight is not None else None
    _launch(x, out, eps, weight, residual=residual, post=post)
    return residual if out is None else out


def empty_quantized(rows: int, width: int, device: torch.device) -> Quantized:
    groups = width // GROUP
    return Quantized(
        torch.empty(rows, width, dtype=torch.int8, device=device),
        torch.empty(rows, groups, dtype=torch.float32, device=device),
        torch.empty(rows, groups, 2, dtype=torch.float32, device=device),
    )


def quantize(
    x: Tensor, weight: Tensor | None = None, eps: float = 0.0, residual: Tensor | None = None, post: Tensor | None = None
) -> Quantized:
    """Rows (n, K) as int8 per 32; with `weight` their `rms_norm`, with `residual` after the sum, as `add_norm`."""
    out = empty_quantized(x.shape[0], x.shape[1], x.device)
    _launch(x.contiguous(), out, eps, weight, residual=residual, post=post)
    return out
