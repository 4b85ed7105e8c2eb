"""Attention over the paged KV cache: one kernel for prefill and decode, and the sum of split keys. Knows no model.

Caches are those of `cache`. The query heads of a key-value head are rows of one tile, so its keys are read once. Few queries
on a long context have its keys split at fixed positions, so a row's sums do not depend on the other sequences of its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.engine.batch import KVCache
from ollamapy.triton_kernels import cache as caches
from ollamapy.triton_kernels import tuning
from ollamapy.triton_kernels.attention_plan import AttentionPlan

DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

TILE_KEYS = 64  # fewer for heads of more than TILE_HEAD_BYTES: tiles of heads of 256 would spill and outgrow shared memory
TILE_HEAD_BYTES = 256
COMBINED = 16  # splits that are added together: one shape for any number of them, so one order of sums


@triton.jit
def attention_kernel(
    q,
    key,
    value,
    key_steps,
    value_steps,
    out,
    peak,
    total,
    sinks,
    tile_sequence,
    tile_first,
    tile_part,
    query_start,
    seq_lens,
    block_table,
    table_width,
    scale,
    cap,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED_D: tl.constexpr,
    PADDED_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    DOT: tl.constexpr,
    KIND: tl.constexpr,
):
    """One tile: TOKENS queries of a sequence, all heads of one key-value head, and SPLIT keys (0: all of them).

    Writes softmax(q k^T scale) v to out (n, H, DV); or with SPLIT the unnormalized sums to out (parts, TOKENS, H, DV) with
    their maximum and total (parts, TOKENS, H), float32, in units of log2; split s of a tile is part tile_part + s. A split
    without keys has a total of zero and no sums. `window` is the reach: the first hidden distance.
    KIND 1: a Q8_0 cache, rows of codes with their steps behind them (see `cache`). Products are of type DOT, sums float32.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    group: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.load(tile_sequence + tile)
    begin = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - begin
    length = tl.load(seq_lens + sequence)
    first = tl.load(tile_first + tile)
    r = tl.arange(0, ROWS)
    query = first + r // group
    head = kv_head * group + r % group
    real = (r < TOKENS * group) & (query < queries)
    position = length - queries + query
    token = (begin + tl.minimum(query, queries - 1)).to(tl.int64)
    head = tl.where(real, head, kv_head * group)
    dim = tl.arange(0, PADDED_D)
    dim_v = tl.arange(0, PADDED_DV)
    rows = tl.load(q + (token * HEADS + head)[:, None] * D + dim[None, :], (dim < D)[None, :], other=0.0)
    rows = (rows.to(tl.float32) * scale).to(DOT)

    start = 0
    stop = length
    last = length - queries + tl.minimum(first + TOKENS, queries) - 1
    if CAUSAL:
        stop = last + 1
    if WINDOW:
        start = tl.maximum(length - queries + first - window + 1, 0) // KEYS * KEYS
        if not CAUSAL:
            stop = tl.minimum(length, last + window)
    if SPLIT != 0:
        split = tl.program_id(2)
        if split * SPLIT >= length:
            return
        start = tl.maximum(start, split * SPLIT)
        stop = tl.minimum(stop, (split + 1) * SPLIT)

    if SINKS and SPLIT == 0 and TOKENS != 1:
        most = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        sum = tl.full((ROWS,), 1.0, tl.float32)
    else:
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, PADDED_DV), tl.float32)
    for base in tl.range(start, stop, KEYS):
        at = base + tl.arange(0, KEYS)
        held = at < length
        block = tl.load(block_table + sequence.to(tl.int64) * table_width + at // BLOCK, held, other=0).to(tl.int64)
        slot = (block * KV_HEADS + kv_head) * BLOCK + at % BLOCK
        mask = held[None, :] & (dim < D)[:, None]
        if KIND == 1:
            k = tl.load(key + slot[None, :] * (D + D // 16) + dim[:, None], mask, other=0).to(tl.float32)
            at_steps = key_steps + slot[None, :] * ((D + D // 16) // 2) + D // 2 + (dim // 32)[:, None]
            k = (k * tl.load(at_steps, mask, other=0.0).to(tl.float32)).to(DOT)
        else:
            k = tl.load(key + slot[None, :] * D + dim[:, None], mask, other=0.0).to(DOT)
        scores = tl.dot(rows, k, input_precision="ieee")
        if CAP:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
        seen = held[None, :] & (at < stop)[None, :]
        distance = position[:, None] - at[None, :]
        if CAUSAL:
            seen &= distance >= 0
            if WINDOW:
                seen &= distance < window
        elif WINDOW:
            seen &= tl.abs(distance) < window
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        old = tl.exp2(most - finite)
        parts = tl.exp2(scores - finite[:, None])
        sum = sum * old + tl.sum(parts, 1)
        mask = held[:, None] & (dim_v < DV)[None, :]
        if KIND == 1:
            v = tl.load(value + slot[:, None] * (DV + DV // 16) + dim_v[None, :], mask, other=0).to(tl.float32)
            at_steps = value_steps + slot[:, None] * ((DV + DV // 16) // 2) + DV // 2 + (dim_v // 32)[None, :]
            v = (v * tl.load(at_steps, mask, other=0.0).to(tl.float32)).to(DOT)
        else:
            v = tl.load(value + slot[:, None] * DV + dim_v[None, :], mask, other=0.0).to(DOT)
        acc = tl.dot(parts.to(DOT), v, acc * old[:, None], input_precision="ieee")
        most = higher

    mask = real[:, None] & (dim_v < DV)[None, :]
    if SINKS and SPLIT == 0 and TOKENS == 1:  # decoding, as `combine_kernel` does it: one split and none have the same bits
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(most, sink)
        sum = tl.div_rn(sum, tl.exp2(higher - most)) + tl.exp2(sink - higher)
        acc = acc * tl.exp2(most - higher)[:, None]
    if SPLIT != 0:
        part = (tl.load(tile_part + tile) + tl.program_id(2)).to(tl.int64)
        target = (part * TOKENS + r // group) * HEADS + head
        tl.store(peak + target, most, real)
        tl.store(total + target, sum, real)
        mask &= start < stop
    else:
        target = token * HEADS + head
        acc = acc / tl.where(real, sum, 1.0)[:, None]
    tl.store(out + target[:, None] * DV + dim_v[None, :], acc.to(out.dtype.element_ty), mask)


@triton.jit
def combine_kernel(
    parts,
    peak,
    total,
    sinks,
    tile_sequence,
    tile_first,
    tile_part,
    query_start,
    seq_lens,
    out,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    PADDED_DV: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Adds the splits of one row and head in the order of their keys, CHUNK at a time: out (n, H, DV)."""
    tile = tl.program_id(0) // TOKENS
    token = tl.program_id(0) % TOKENS
    head = tl.program_id(1)
    sequence = tl.load(tile_sequence + tile)
    begin = tl.load(query_start + sequence)
    query = tl.load(tile_first + tile) + token
    if begin + query >= tl.load(query_start + sequence + 1):
        return
    splits = (tl.load(seq_lens + sequence) + SPLIT - 1) // SPLIT
    first = (tl.load(tile_part + tile).to(tl.int64) * TOKENS + token) * HEADS + head
    i = tl.arange(0, CHUNK)
    dim = tl.arange(0, PADDED_DV)
    most = float("-inf")
    for base in range(0, splits, CHUNK):
        at = first + (base + i) * (TOKENS * HEADS)
        most = tl.maximum(most, tl.max(tl.load(peak + at, base + i < splits, other=float("-inf")), 0))
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        most = tl.maximum(most, sink)
    sum = 0.0
    acc = tl.zeros((PADDED_DV,), tl.float32)
    for base in range(0, splits, CHUNK):
        at = first + (base + i) * (TOKENS * HEADS)
        tops = tl.load(peak + at, base + i < splits, other=float("-inf"))
        sums = tl.load(total + at, base + i < splits, other=0.0)
        sum += tl.sum(tl.div_rn(sums, tl.exp2(most - tops)), 0)  # no product, which might be rounded with the sum that follows
        mask = (sums != 0.0)[:, None] & (dim < DV)[None, :]
        part = tl.load(parts + at[:, None] * DV + dim[None, :], mask, other=0.0)
        acc += tl.sum(part * tl.exp2(tops - most)[:, None], 0)
    if SINKS:
        sum += tl.exp2(sink - most)
    row = (begin + query).to(tl.int64)
    tl.store(out + (row * HEADS + head) * DV + dim, (acc / sum).to(out.dtype.element_ty), dim < DV)


def attention(
    q: Tensor,
    cache: KVCache,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """(n, H, D) -> (n, H * Dv): see `ollamapy.reference.attention`. Rows beyond the batch's are zero."""
    q = q.contiguous()
    kv_heads, block = cache.value.shape[1:3]
    length, value_length = caches.lengths(cache)
    batch, heads = plan.batch, q.shape[1]
    key, key_steps = caches.parts(cache.key)
    value, value_steps = caches.parts(cache.value)
    dot = cache.key.dtype if cache.key.dtype in DOT_TYPES else tuning.activations(q.device)
    padded = [max(triton.next_power_of_2(size), 16) for size in (length, value_length)]
    head_bytes = max(padded) * dot.itemsize
    wide = head_bytes > TILE_HEAD_BYTES
    keys = max(TILE_KEYS * TILE_HEAD_BYTES // head_bytes, 16) if wide else TILE_KEYS
    if (caches.quantized(cache) and head_bytes >= TILE_HEAD_BYTES) or (dot is torch.float32 and wide):
        keys = max(keys // 2, 16)  # steps are held beside the keys, or products done by FMA: 8 and 424 bytes spilled
    out = q.new_zeros(q.shape[0], heads, value_length)
    for launch in plan.for_group(heads // kv_heads):
        tiles, splits = launch.sequence.shape[0], launch.splits
        parts = out
        peak = total = q
        if splits:
            parts = torch.empty(launch.parts, launch.tokens, heads, value_length, dtype=torch.float32, device=q.device)
            peak, total = torch.empty(2, launch.parts, launch.tokens, heads, dtype=torch.float32, device=q.device)
        attention_kernel[(tiles, kv_heads, max(splits, 1))](
            *(q, key, value, key_steps, value_steps, parts, peak, total, q if sinks is None else sinks),
            *(launch.sequence, launch.first, launch.part, batch.query_start, batch.seq_lens, batch.block_table),
            table_width=batch.block_table.shape[1],
            scale=scale,
            cap=cap,
            window=window if causal else window // 2 + 1,
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=length,
            DV=value_length,
            PADDED_D=padded[0],
            PADDED_DV=padded[1],
            BLOCK=block,
            TOKENS=launch.tokens,
            ROWS=launch.rows,
            KEYS=keys,
            SPLIT=plan.split_keys if splits else 0,
            CAUSAL=causal,
            WINDOW=window > 0,
            CAP=cap > 0.0,
            SINKS=sinks is not None,
            DOT=DOT_TYPES[dot],
            KIND=int(caches.quantized(cache)),
            num_warps=8 if head_bytes >= TILE_HEAD_BYTES and launch.tokens > 1 else 4,
            num_stages=2 if wide else 3,
        )
        if splits:
            combine_kernel[(tiles * launch.tokens, heads)](
                *(parts, peak, total, q if sinks is None else sinks),
                *(launch.sequence, launch.first, launch.part, batch.query_start, batch.seq_lens, out),
                HEADS=heads,
                DV=value_length,
                PADDED_DV=padded[1],
                TOKENS=launch.tokens,
                SPLIT=plan.split_keys,
                CHUNK=COMBINED,
                SINKS=sinks is not None,
            )
    return out.flatten(1)
