"""RMSNorm and LayerNorm over the last dimension, with the residual sum before them. One program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def norm_kernel(
    x,
    residual,
    weight,
    bias,
    out,
    width,
    eps,
    ADD: tl.constexpr,
    CENTRE: tl.constexpr,
    BIAS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """out = norm(x) * weight + bias; with ADD, residual += x first, in place, and that is normed."""
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, PADDED)
    live = i < width
    value = tl.load(x + row + i, live, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + i, live, other=0.0).to(tl.float32)
        tl.store(residual + row + i, value.to(residual.dtype.element_ty), live)
    if CENTRE:
        value = tl.where(live, value - tl.sum(value, 0) / width, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps)
    value *= tl.load(weight + i, live, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + i, live, other=0.0).to(tl.float32)
    tl.store(out + row + i, value.to(out.dtype.element_ty), live)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centre: bool) -> Tensor:
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    padded = triton.next_power_of_2(width)
    if x.numel():
        norm_kernel[(x.numel() // width,)](
            *(x, x if residual is None else residual, weight, weight if bias is None else bias, out, width, eps),
            ADD=residual is not None,
            CENTRE=centre,
            BIAS=bias is not None,
            PADDED=padded,
            num_warps=min(max(padded // 512, 1), 16),
        )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return _launch(x, None, weight, None, eps, centre=False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias."""
    return _launch(x, None, weight, bias, eps, centre=True)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place (contiguous), then `rms_norm(residual)` of the sum before it is rounded to residual's type."""
    assert residual.is_contiguous() and residual.shape == x.shape
    return _launch(x, residual, weight, None, eps, centre=False)
