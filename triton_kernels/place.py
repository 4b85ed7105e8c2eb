"""From a layer's projections to attention in one launch: norms of heads, rope, temperature, keys and values to their slots.

A program has a token and one key-value head with its query heads. Elements and their partners in the rotation are loaded in the
order in which they lie, so a head is a plain vector; the queries get memory of their own, since a partner may be read later.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.engine.batch import KVCache
from ollamapy.triton_kernels import cache as caches
from ollamapy.triton_kernels.norm import round_even


class Turn(NamedTuple):
    """How the heads of a layer are normed and turned."""

    table: Tensor  # (positions, n_rot): the cosines of the pairs, then their sines
    interleaved: bool
    q_norm: Tensor | None  # (D,)
    k_norm: Tensor | None
    eps: float


@triton.jit
def _turned(
    heads,
    live,
    norm,
    length_scale,
    cos,
    sin,
    eps,
    NORM: tl.constexpr,
    D: tl.constexpr,
    ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PADDED_D: tl.constexpr,
):
    """Heads (R, 1) of pointers -> (R, PADDED_D) float32, turned."""
    i = tl.arange(0, PADDED_D)
    partner = i ^ 1 if INTERLEAVED else tl.where(i < ROT // 2, i + ROT // 2, i - ROT // 2)
    partner = tl.where(i < ROT, partner, i)
    inside = live & (i < D)[None, :]
    x = tl.load(heads + i[None, :], inside, other=0.0).to(tl.float32)
    y = tl.load(heads + partner[None, :], inside, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= factor * tl.load(norm + i, i < D, other=0.0).to(tl.float32)[None, :]
        y *= factor * tl.load(norm + partner, i < D, other=0.0).to(tl.float32)[None, :]
    return (x * cos[None, :] + y * sin[None, :]) * length_scale


@triton.jit
def _remember(values, store, steps, at, live, D: tl.constexpr, PADDED_D: tl.constexpr, KIND: tl.constexpr):
    """A head (1, PADDED_D) to slot `at` of a cache."""
    i = tl.arange(0, PADDED_D)
    if KIND == 1:
        groups: tl.constexpr = PADDED_D // 32
        parts = tl.reshape(values, (groups, 32))
        step = (tl.max(tl.abs(parts), 1) / 127.0).to(tl.float16)
        wide = step.to(tl.float32)
        codes = round_even(parts / tl.where(wide > 0.0, wide, 1.0)[:, None])
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)  # the step was rounded down, perhaps
        g = tl.arange(0, groups)
        stride: tl.constexpr = D + D // 16
        place = g[:, None] * 32 + tl.arange(0, 32)[None, :]
        tl.store(store + at * stride + place, codes.to(tl.int8), live & (place < D))
        tl.store(steps + at * (stride // 2) + D // 2 + g, step, live & (g < D // 32))
    else:
        tl.store(store + at * D + i[None, :], values.to(store.dtype.element_ty), live & (i < D)[None, :])


@triton.jit
def place_kernel(
    qkv,
    table,
    positions,
    temper,
    q_norm,
    k_norm,
    slot_mapping,
    q_out,
    key,
    value,
    key_steps,
    value_steps,
    stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    TEMPER: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
):
    """qkv (n, H * D + Hkv * D + Hkv * DV). Slots below zero are nobody's: nothing is written there."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    group: tl.constexpr = HEADS // KV_HEADS
    i = tl.arange(0, PADDED_D)
    if INTERLEAVED:
        pair = i // 2
        sign = tl.where(i % 2 == 0, -1.0, 1.0)
    else:
        pair = i % (ROT // 2)
        sign = tl.where(i < ROT // 2, -1.0, 1.0)
    angles = table + tl.load(positions + token) * ROT
    cos = tl.load(angles + pair, i < ROT, other=1.0)
    sin = sign * tl.load(angles + ROT // 2 + pair, i < ROT, other=0.0)
    row = qkv + token * stride
    r = tl.arange(0, PADDED_GROUP)
    head = kv_head * group + r
    live = (r < group)[:, None]
    factor = tl.load(temper + token) if TEMPER else 1.0
    q = _turned(row + head[:, None] * D, live, q_norm, factor, cos, sin, eps, Q_NORM, D, ROT, INTERLEAVED, PADDED_D)
    target = q_out + (token * HEADS + head)[:, None] * D + i[None, :]
    tl.store(target, q.to(q_out.dtype.element_ty), live & (i < D)[None, :])

    slot = tl.load(slot_mapping + token)
    has_slot = slot >= 0
    at = (slot // BLOCK * KV_HEADS + kv_head) * BLOCK + slot % BLOCK
    one = tl.arange(0, 1)
    heads = row + (HEADS + kv_head + one)[:, None] * D
    k = _turned(heads, (one < 1)[:, None], k_norm, 1.0, cos, sin, eps, K_NORM, D, ROT, INTERLEAVED, PADDED_D)
    _remember(k, key, key_steps, at, has_slot, D, PADDED_D, KIND)
    dim = tl.arange(0, PADDED_DV)
    v = tl.load(row + (HEADS + KV_HEADS) * D + kv_head * DV + (one[:, None] + dim[None, :]), (dim < DV)[None, :], other=0.0)
    _remember(v.to(tl.float32), value, value_steps, at, has_slot, DV, PADDED_DV, KIND)


def place(
    qkv: Tensor,
    heads: int,
    turn: Turn,
    positions: Tensor,
    temper: Tensor | None,
    cache: KVCache,
    slot_mapping: Tensor,
) -> Tensor:
    """qkv (n, H * D + Hkv * D + Hkv * Dv) -> queries (n, H, D), turned; the rows' keys and values are in the cache then."""
    kv_heads, block = cache.key.shape[1:3]
    length, value_length = caches.lengths(cache)
    q = torch.empty(qkv.shape[0], heads, length, dtype=qkv.dtype, device=qkv.device)
    if not qkv.shape[0]:
        return q
    key, key_steps = caches.parts(cache.key)
    value, value_steps = caches.parts(cache.value)
    least = 32 if caches.quantized(cache) else 1
    place_kernel[(qkv.shape[0], kv_heads)](
        *(qkv, turn.table, positions, q if temper is None else temper),
        *(q if norm is None else norm for norm in (turn.q_norm, turn.k_norm)),
        *(slot_mapping, q, key, value, key_steps, value_steps, qkv.stride(0), turn.eps),
        HEADS=heads,
        KV_HEADS=kv_heads,
        D=length,
        DV=value_length,
        ROT=turn.table.shape[1],
        INTERLEAVED=turn.interleaved,
        Q_NORM=turn.q_norm is not None,
        K_NORM=turn.k_norm is not None,
        TEMPER=temper is not None,
        BLOCK=block,
        KIND=int(caches.quantized(cache)),
        PADDED_GROUP=triton.next_power_of_2(heads // kv_heads),
        PADDED_D=triton.next_power_of_2(max(length, least)),
        PADDED_DV=triton.next_power_of_2(max(value_length, least)),
    )
    return q


@triton.jit
def write_kernel(
    k,
    v,
    slot_mapping,
    key,
    value,
    key_steps,
    value_steps,
    k_stride,
    v_stride,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    at = (slot // BLOCK * KV_HEADS + kv_head) * BLOCK + slot % BLOCK
    i = tl.arange(0, 1)[:, None] + tl.arange(0, PADDED_D)[None, :]
    row = tl.load(k + token * k_stride + kv_head * D + i, i < D, other=0.0).to(tl.float32)
    _remember(row, key, key_steps, at, slot >= 0, D, PADDED_D, KIND)
    i = tl.arange(0, 1)[:, None] + tl.arange(0, PADDED_DV)[None, :]
    row = tl.load(v + token * v_stride + kv_head * DV + i, i < DV, other=0.0).to(tl.float32)
    _remember(row, value, value_steps, at, slot >= 0, DV, PADDED_DV, KIND)


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """Rows of k (n, Hkv, D) and v (n, Hkv, Dv) to their slots. Rows beyond slot_mapping are padding and are left out."""
    for heads in (k, v):
        assert heads.stride(2) == 1 and heads.stride(1) == heads.shape[2], (heads.shape, heads.stride())
    if not slot_mapping.shape[0]:
        return
    key, key_steps = caches.parts(cache.key)
    value, value_steps = caches.parts(cache.value)
    least = 32 if caches.quantized(cache) else 1
    write_kernel[(slot_mapping.shape[0], k.shape[1])](
        *(k, v, slot_mapping, key, value, key_steps, value_steps, k.stride(0), v.stride(0)),
        KV_HEADS=k.shape[1],
        D=k.shape[2],
        DV=v.shape[2],
        BLOCK=cache.key.shape[2],
        KIND=int(caches.quantized(cache)),
        PADDED_D=triton.next_power_of_2(max(k.shape[2], least)),
        PADDED_DV=triton.next_power_of_2(max(v.shape[2], least)),
    )
