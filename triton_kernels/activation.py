"""Gated activations and the logit softcap, element by element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.reference import Activation

BLOCK = 1024


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def gate_times_up(gate, up, GELU: tl.constexpr):
    """act(gate) * up in float32."""
    if GELU:
        return 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))) * up
    else:
        return gate * tl.sigmoid(gate) * up


@triton.jit
def gated_kernel(gate, up, out, width, gate_stride, up_stride, GELU: tl.constexpr, SIZE: tl.constexpr):
    """out = act(gate) * up; rows of gate and up may be halves of longer ones."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    live = i < width
    g = tl.load(gate + row * gate_stride + i, live, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + i, live, other=0.0).to(tl.float32)
    tl.store(out + row * width + i, gate_times_up(g, u, GELU).to(out.dtype.element_ty), live)


@triton.jit
def softcap_kernel(x, count, cap, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + i, i < count, other=0.0).to(tl.float32)
    tl.store(x + i, (cap * _tanh(value / cap)).to(x.dtype.element_ty), i < count)


def gated_activation(gate: Tensor, up: Tensor, kind: Activation, out: Tensor | None = None) -> Tensor:
    """act(gate) * up (n, F), in memory of its own."""
    assert gate.stride(-1) == up.stride(-1) == 1
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device) if out is None else out
    if out.numel():
        size = min(BLOCK, triton.next_power_of_2(width))
        gated_kernel[(rows, triton.cdiv(width, size))](
            *(gate, up, out, width, gate.stride(0), up.stride(0)), GELU=kind == "gelu_tanh", SIZE=size
        )
    return out


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), in place."""
    assert x.is_contiguous()
    if x.numel():
        softcap_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, x.numel(), cap, SIZE=BLOCK)
    return x
