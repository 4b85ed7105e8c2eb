"""Paged attention, rope and KV writing, interpreted, against ollamapy.reference."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from ollamapy import reference
from ollamapy.engine.batch import Batch, KVCache, LayerState
from ollamapy.reference import attention as oracle
from ollamapy.triton_kernels import attention as paged
from ollamapy.triton_kernels import rope as turning
from tests.models.paged import make_batch

CPU = torch.device("cpu")


def caches(state: LayerState, contexts: list[int], block: int, dtype: torch.dtype) -> tuple[KVCache, KVCache, list[list[int]]]:
    """The same random keys and values in both layouts, in shuffled blocks; what no sequence owns is NaN."""
    torch.manual_seed(0)
    count = sum(-(-length // block) for length in contexts) + 2
    free = list(range(count))
    random.Random(0).shuffle(free)
    ours, theirs = paged.new_cache(state, count, block, dtype, CPU), reference.new_cache(state, count, block, dtype, CPU)
    for tensor in (ours.key, ours.value, theirs.key, theirs.value):
        tensor.fill_(torch.nan)
    tables = [[free.pop() for _ in range(-(-length // block))] for length in contexts]
    for table, length in zip(tables, contexts, strict=True):
        batch = make_batch([table], [length], [length], block)
        k = torch.randn(length, state.num_kv_heads, state.key_length)
        v = torch.randn(length, state.num_kv_heads, state.value_length)
        reference.write_kv(k, v, theirs, batch.slot_mapping)
    ours.key.copy_(theirs.key.transpose(1, 2))
    ours.value.copy_(theirs.value.transpose(1, 2))
    return ours, theirs, tables


def compare(
    q: Tensor, batch: Batch, ours: KVCache, theirs: KVCache, tolerance: float, **options: float | bool | Tensor | None
) -> None:
    got = paged.attention(q, ours, paged.plan(batch, ours), **options)
    want = oracle.attention(q.float(), theirs, oracle.plan(batch, theirs), **options)
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


# heads, kv heads, D, Dv, block
SHAPES = [(4, 4, 16, 16, 16), (6, 2, 24, 40, 16), (9, 3, 64, 64, 32), (8, 1, 80, 16, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 21}, {"cap": 3.0, "sinks": True}, {"causal": False}], ids=str)
def test_mixed_batch(shape: tuple[int, ...], options: dict[str, float | bool]) -> None:
    """Decoding, whole prompts, and a prompt's later part together."""
    heads, kv_heads, length, value_length, block = shape
    queries, contexts = [1, 37, 5, 1], [70, 37, 90, 1]
    ours, theirs, tables = caches(LayerState(kv_heads, length, value_length), contexts, block, torch.float32)
    q = torch.randn(sum(queries), heads, length)
    sinks = torch.randn(heads) if options.get("sinks") else None
    batch = make_batch(tables, queries, contexts, block)
    compare(q, batch, ours, theirs, 2e-6, **{**options, "scale": length**-0.5, "sinks": sinks})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_caches(dtype: torch.dtype) -> None:
    queries, contexts = [1, 20], [70, 50]
    ours, theirs, tables = caches(LayerState(2, 32, 32), contexts, 16, dtype)
    q = torch.randn(sum(queries), 4, 32).to(dtype).float()
    batch = make_batch(tables, queries, contexts, 16)
    # scores and probabilities are rounded to the cache's type: three roundings of numbers below 4
    compare(q, batch, ours, theirs, 4 * 3 * torch.finfo(dtype).eps, scale=32**-0.5)


@pytest.mark.parametrize("options", [{}, {"window": 600}, {"sinks": True}, {"window": 40, "cap": 5.0}], ids=str)
def test_split_keys(monkeypatch: pytest.MonkeyPatch, options: dict[str, float | bool]) -> None:
    """Contexts below, at and beyond the ends of splits; a window that leaves whole splits out."""
    monkeypatch.setattr(paged, "SPLIT_KEYS", 128)
    contexts = [5, 128, 129, 300]
    ours, theirs, tables = caches(LayerState(2, 16, 24), contexts, 16, torch.float32)
    q = torch.randn(4, 6, 16)
    sinks = torch.randn(6) if options.get("sinks") else None
    batch = make_batch(tables, [1] * 4, contexts, 16)
    compare(q, batch, ours, theirs, 2e-6, **{**options, "scale": 0.3, "sinks": sinks})


def test_rows_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "SPLIT_KEYS", 64)
    contexts = [40, 150]
    ours, _, tables = caches(LayerState(1, 16, 16), contexts, 16, torch.float32)
    q = torch.randn(2, 3, 16)
    together = paged.attention(q, ours, paged.plan(make_batch(tables, [1, 1], contexts, 16), ours), scale=0.25)
    for i in range(2):
        alone = make_batch(tables[i : i + 1], [1], contexts[i : i + 1], 16)
        assert torch.equal(paged.attention(q[i : i + 1], ours, paged.plan(alone, ours), scale=0.25)[0], together[i])


def angles(rows: int, rot: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    theta = torch.rand(rows, 1, rot // 2) * 6
    if interleaved:
        return theta.cos().repeat_interleave(2, -1), torch.stack([-theta.sin(), theta.sin()], -1).flatten(-2)
    return theta.cos().repeat(1, 1, 2), torch.cat([-theta.sin(), theta.sin()], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "length", "rot"), [(3, 1, 16, 16), (4, 2, 40, 24)])
def test_rope_and_write(heads: int, kv_heads: int, length: int, rot: int, interleaved: bool) -> None:
    """The heads are parts of one projection's rows, as in a model; the last row is padding without a slot."""
    torch.manual_seed(0)
    state = LayerState(kv_heads, length, 24)
    rows, slots = 4, torch.tensor([37, 3, 16])
    parts = [heads * length, kv_heads * length, kv_heads * 24]
    joined = torch.randn(rows, sum(parts))
    cos, sin = angles(rows, rot, interleaved)

    def split(rows_: Tensor) -> list[Tensor]:
        shapes = ((heads, length), (kv_heads, length), (kv_heads, 24))
        return [part.unflatten(1, shape) for part, shape in zip(rows_.split(parts, 1), shapes, strict=True)]

    q, k, v = split(joined.clone())
    theirs = reference.new_cache(state, 3, 16, torch.float16, CPU)
    reference.rope(q, k, cos, sin, interleaved)
    reference.write_kv(k, v, theirs, slots)

    apart, fused = paged.new_cache(state, 3, 16, torch.float16, CPU), paged.new_cache(state, 3, 16, torch.float16, CPU)
    q1, k1, v1 = split(joined.clone())
    turning.rope(q1, k1, cos, sin, interleaved)
    turning.write_kv(k1, v1, apart, slots)
    q2, k2, v2 = split(joined.clone())
    turning.rope_write_kv(q2, k2, v2, (cos, sin), interleaved, fused, slots)
    for got_q, got_k, cache in ((q1, k1, apart), (q2, k2, fused)):
        torch.testing.assert_close(got_q, q, rtol=0, atol=1e-6)
        torch.testing.assert_close(got_k, k, rtol=0, atol=1e-6)
        torch.testing.assert_close(cache.key.transpose(1, 2), theirs.key, rtol=2**-10, atol=1e-6)
        assert torch.equal(cache.value.transpose(1, 2), theirs.value)
