"""Rotary embedding in place, and keys and values to their slots of the paged cache; or both in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ollamapy.engine.batch import KVCache


@triton.jit
def _turn(heads, token, head, pair, live, stride, LENGTH: tl.constexpr, cos, sin, ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both elements of the pairs of some heads, (H, P) each: turned, not yet stored; and where they are in a head."""
    if INTERLEAVED:
        i = 2 * pair
        j = i + 1
    else:
        i = pair
        j = pair + ROT // 2
    base = heads + token * stride + head[:, None] * LENGTH
    a = tl.load(base + i[None, :], live, other=0.0).to(tl.float32)
    b = tl.load(base + j[None, :], live, other=0.0).to(tl.float32)
    known = pair < ROT // 2
    c0 = tl.load(cos + token * ROT + i, known, other=0.0)
    s0 = tl.load(sin + token * ROT + i, known, other=0.0)
    c1 = tl.load(cos + token * ROT + j, known, other=0.0)
    s1 = tl.load(sin + token * ROT + j, known, other=0.0)
    return a * c0[None, :] + b * s0[None, :], b * c1[None, :] + a * s1[None, :], i, j


@triton.jit
def _store_heads(
    source,
    store,
    token,
    has_slot,
    slot,
    stride,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
    FIRST: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_LENGTH: tl.constexpr,
):
    """Elements FIRST and following of a token's heads to its slot."""
    head = tl.arange(0, PADDED_HEADS)
    dim = FIRST + tl.arange(0, PADDED_LENGTH)
    live = (head < HEADS)[:, None] & (dim < LENGTH)[None, :] & has_slot
    values = tl.load(source + token * stride + head[:, None] * LENGTH + dim[None, :], live, other=0.0)
    at = (slot // BLOCK * HEADS + head) * BLOCK + slot % BLOCK
    tl.store(store + at[:, None] * LENGTH + dim[None, :], values.to(store.dtype.element_ty), live)


@triton.jit
def rope_kernel(
    q,
    k,
    v,
    cos,
    sin,
    key,
    value,
    slot_mapping,
    slots,
    q_stride,
    k_stride,
    v_stride,
    ROPE: tl.constexpr,
    WRITE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROT: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    LENGTH: tl.constexpr,
    VALUE_LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_KV_HEADS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    PADDED_LENGTH: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
):
    """One token. ROPE: q and k are turned in place. WRITE: k, turned, and v go to the token's slot."""
    token = tl.program_id(0).to(tl.int64)
    has_slot = token < slots
    slot = tl.load(slot_mapping + token, has_slot, other=0) if WRITE else token
    block = slot // BLOCK
    offset = slot % BLOCK
    if ROPE:
        pair = tl.arange(0, PADDED_PAIRS)
        head = tl.arange(0, PADDED_HEADS)
        live = (head < HEADS)[:, None] & (pair < ROT // 2)[None, :]
        a, b, i, j = _turn(q, token, head, pair, live, q_stride, LENGTH, cos, sin, ROT, INTERLEAVED)
        at = q + token * q_stride + head[:, None] * LENGTH
        tl.store(at + i[None, :], a.to(q.dtype.element_ty), live)
        tl.store(at + j[None, :], b.to(q.dtype.element_ty), live)
        head = tl.arange(0, PADDED_KV_HEADS)
        live = (head < KV_HEADS)[:, None] & (pair < ROT // 2)[None, :]
        a, b, i, j = _turn(k, token, head, pair, live, k_stride, LENGTH, cos, sin, ROT, INTERLEAVED)
        at = k + token * k_stride + head[:, None] * LENGTH
        tl.store(at + i[None, :], a.to(k.dtype.element_ty), live)
        tl.store(at + j[None, :], b.to(k.dtype.element_ty), live)
        if WRITE:
            inside = live & has_slot
            at = key + ((block * KV_HEADS + head) * BLOCK + offset)[:, None] * LENGTH
            tl.store(at + i[None, :], a.to(key.dtype.element_ty), inside)
            tl.store(at + j[None, :], b.to(key.dtype.element_ty), inside)
    if WRITE:
        if not ROPE:
            _store_heads(k, key, token, has_slot, slot, k_stride, BLOCK, KV_HEADS, LENGTH, 0, PADDED_KV_HEADS, PADDED_LENGTH)
        elif ROT < LENGTH:
            _store_heads(k, key, token, has_slot, slot, k_stride, BLOCK, KV_HEADS, LENGTH, ROT, PADDED_KV_HEADS, PADDED_LENGTH)
        _store_heads(v, value, token, has_slot, slot, v_stride, BLOCK, KV_HEADS, VALUE_LENGTH, 0, PADDED_KV_HEADS, PADDED_VALUE)


def _heads(x: Tensor) -> Tensor:
    """(n, heads, D) whose heads lie one after the other; rows may be parts of longer ones."""
    assert x.stride(2) == 1 and x.stride(1) == x.shape[2], (x.shape, x.stride())
    return x


def _launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    cache: KVCache | None,
    slot_mapping: Tensor | None,
) -> None:
    """Without q: no rope. Without cache: no writing."""
    q_, v_ = k if q is None else q, k if v is None else v
    for heads in (q_, k, v_):
        _heads(heads)
    cos, sin = (k, k) if angles is None else (angles[0].contiguous(), angles[1].contiguous())
    rot = 2 if angles is None else cos.shape[-1]
    writes = cache is not None and slot_mapping is not None
    target = (cache.key, cache.value, slot_mapping, slot_mapping.shape[0]) if writes else (k, k, k, 0)
    power = triton.next_power_of_2
    if not k.shape[0]:
        return
    rope_kernel[(k.shape[0],)](
        *(q_, k, v_, cos, sin),
        *target,
        *(q_.stride(0), k.stride(0), v_.stride(0)),
        ROPE=angles is not None,
        WRITE=cache is not None,
        INTERLEAVED=interleaved,
        ROT=rot,
        HEADS=q_.shape[1],
        KV_HEADS=k.shape[1],
        LENGTH=k.shape[2],
        VALUE_LENGTH=v_.shape[2],
        BLOCK=1 if cache is None else cache.key.shape[2],
        PADDED_HEADS=power(q_.shape[1]),
        PADDED_KV_HEADS=power(k.shape[1]),
        PADDED_PAIRS=power(rot // 2),
        PADDED_LENGTH=power(k.shape[2]),
        PADDED_VALUE=power(v_.shape[2]),
    )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Turns the first n_rot elements of each head of q and k (n, heads, D), in place: see `ollamapy.reference.rope`."""
    _launch(q, k, None, (cos, sin), interleaved, None, None)


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """Rows of k (n, Hkv, D) and v (n, Hkv, Dv) to their slots. Rows beyond slot_mapping are padding and are left out."""
    _launch(None, k, v, None, False, cache, slot_mapping)


def rope_write_kv(
    q: Tensor, k: Tensor, v: Tensor, angles: tuple[Tensor, Tensor], interleaved: bool, cache: KVCache, slot_mapping: Tensor
) -> None:
    """`rope` with angles (cos, sin), then `write_kv`, in one launch."""
    _launch(q, k, v, angles, interleaved, cache, slot_mapping)
