"""Rotary embedding of queries and keys, in place: the op by itself. `place` turns and writes to the cache in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(
    heads, token, stride, cos, sin, COUNT: tl.constexpr, LENGTH: tl.constexpr, ROT: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Pairs of elements of a token's heads: both are loaded before either is stored."""
    head = tl.arange(0, triton.next_power_of_2(COUNT))
    pair = tl.arange(0, triton.next_power_of_2(ROT // 2))
    if INTERLEAVED:
        i = 2 * pair
        j = i + 1
    else:
        i = pair
        j = pair + ROT // 2
    known = pair < ROT // 2
    live = (head < COUNT)[:, None] & known[None, :]
    base = heads + token * stride + head[:, None] * LENGTH
    a = tl.load(base + i[None, :], live, other=0.0).to(tl.float32)
    b = tl.load(base + j[None, :], live, other=0.0).to(tl.float32)
    c0 = tl.load(cos + token * ROT + i, known, other=0.0)
    s0 = tl.load(sin + token * ROT + i, known, other=0.0)
    c1 = tl.load(cos + token * ROT + j, known, other=0.0)
    s1 = tl.load(sin + token * ROT + j, known, other=0.0)
    tl.store(base + i[None, :], (a * c0[None, :] + b * s0[None, :]).to(heads.dtype.element_ty), live)
    tl.store(base + j[None, :], (b * c1[None, :] + a * s1[None, :]).to(heads.dtype.element_ty), live)


@triton.jit
def rope_kernel(
    q,
    k,
    cos,
    sin,
    q_stride,
    k_stride,
    INTERLEAVED: tl.constexpr,
    ROT: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    _turn(q, token, q_stride, cos, sin, HEADS, LENGTH, ROT, INTERLEAVED)
    _turn(k, token, k_stride, cos, sin, KV_HEADS, LENGTH, ROT, INTERLEAVED)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Turns the first n_rot elements of each head of q and k (n, heads, D), in place: see `ollamapy.reference.rope`."""
    for heads in (q, k):
        assert heads.stride(2) == 1 and heads.stride(1) == heads.shape[2], (heads.shape, heads.stride())
    if k.shape[0]:
        rope_kernel[(k.shape[0],)](
            *(q, k, cos.contiguous(), sin.contiguous(), q.stride(0), k.stride(0)),
            INTERLEAVED=interleaved,
            ROT=cos.shape[-1],
            HEADS=q.shape[1],
            KV_HEADS=k.shape[1],
            LENGTH=k.shape[2],
        )
