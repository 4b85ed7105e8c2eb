"""Paged attention, rope and KV writing, interpreted, against ollamapy.reference."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ollamapy import reference
from ollamapy.engine.batch import Batch, KVCache, LayerState
from ollamapy.errors import UnsupportedModel
from ollamapy.reference import attention as oracle
from ollamapy.triton_kernels import attention as paged
from ollamapy.triton_kernels import attention_plan as plans
from ollamapy.triton_kernels import cache as layouts
from ollamapy.triton_kernels import place, tuning
from ollamapy.triton_kernels import rope as turning
from tests.models.paged import make_batch

CPU = torch.device("cpu")


def caches(state: LayerState, contexts: list[int], block: int, dtype: torch.dtype) -> tuple[KVCache, KVCache, list[list[int]]]:
    """The same random keys and values in both layouts, in shuffled blocks; what no sequence owns is NaN."""
    torch.manual_seed(0)
    count = sum(-(-length // block) for length in contexts) + 2
    free = list(range(count))
    random.Random(0).shuffle(free)
    ours, theirs = layouts.new_cache(state, count, block, dtype, CPU), reference.new_cache(state, count, block, dtype, CPU)
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
    got = paged.attention(q, ours, plans.plan(batch, ours), **options)
    want = oracle.attention(q.float(), theirs, oracle.plan(batch, theirs), **options)
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)


def split_at(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = dataclasses.replace(tuning.of(CPU), split_keys=keys)
    monkeypatch.setattr(tuning, "of", lambda device: table)


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
    split_at(128, monkeypatch)
    contexts = [5, 128, 129, 300]
    ours, theirs, tables = caches(LayerState(2, 16, 24), contexts, 16, torch.float32)
    q = torch.randn(4, 6, 16)
    sinks = torch.randn(6) if options.get("sinks") else None
    batch = make_batch(tables, [1] * 4, contexts, 16)
    compare(q, batch, ours, theirs, 2e-6, **{**options, "scale": 0.3, "sinks": sinks})


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_do_not_depend_on_the_batch(with_sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do they where a batch mate's keys are split and the row's own need not be."""
    split_at(64, monkeypatch)
    contexts = [40, 150, 64, 9]
    ours, _, tables = caches(LayerState(1, 16, 16), contexts, 16, torch.float32)
    q = torch.randn(4, 3, 16)
    options = {"scale": 0.25, "sinks": torch.tensor([0.3, -2.0, 1.7]) if with_sinks else None}
    together = paged.attention(q, ours, plans.plan(make_batch(tables, [1] * 4, contexts, 16), ours), **options)
    for i in range(4):
        alone = make_batch(tables[i : i + 1], [1], contexts[i : i + 1], 16)
        assert torch.equal(paged.attention(q[i : i + 1], ours, plans.plan(alone, ours), **options)[0], together[i])


@pytest.mark.parametrize("options", [{}, {"window": 21}, {"sinks": True, "cap": 3.0}, {"causal": False}], ids=str)
def test_few_queries_on_long_contexts(options: dict[str, float | bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys are split as a single query's are: up to a tile of queries, beside prompts, short contexts and decoding."""
    split_at(64, monkeypatch)
    queries, contexts = [3, 1, 16, 17, 5, 2], [200, 300, 65, 130, 40, 64]
    ours, theirs, tables = caches(LayerState(2, 16, 24), contexts, 16, torch.float32)
    q = torch.randn(sum(queries), 4, 16)
    sinks = torch.randn(4) if options.get("sinks") else None
    batch = make_batch(tables, queries, contexts, 16)
    launches = plans.plan(batch, ours).for_group(2)
    assert [(len(launch.sequence), launch.splits, launch.parts) for launch in launches] == [(1, 5, 5), (4, 0, 0), (3, 4, 8)]
    compare(q, batch, ours, theirs, 2e-6, **{**options, "scale": 0.3, "sinks": sinks})


@pytest.mark.parametrize("with_sinks", [False, True])
def test_several_rows_do_not_depend_on_the_batch(with_sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    split_at(64, monkeypatch)
    queries, contexts = [3, 2, 4, 1], [150, 64, 1500, 90]
    ours, _, tables = caches(LayerState(1, 16, 16), contexts, 16, torch.float32)
    q = torch.randn(sum(queries), 3, 16)
    options = {"scale": 0.25, "sinks": torch.tensor([0.3, -2.0, 1.7]) if with_sinks else None}
    together = paged.attention(q, ours, plans.plan(make_batch(tables, queries, contexts, 16), ours), **options).split(queries)
    for i, part in enumerate(q.split(queries)):
        alone = make_batch(tables[i : i + 1], queries[i : i + 1], contexts[i : i + 1], 16)
        assert torch.equal(paged.attention(part, ours, plans.plan(alone, ours), **options), together[i])


def test_splits_without_keys_are_neither_written_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond a row's end where a recorded step knows a bound only, and those that its window hides: memory that holds
    NaN before keeps it, and none of it reaches the answer."""
    split_at(64, monkeypatch)
    contexts = [70, 300, 40]
    ours, theirs, tables = caches(LayerState(1, 16, 16), contexts, 16, torch.float32)
    q = torch.randn(3, 3, 16)
    batch = make_batch(tables, [1] * 3, contexts, 16)
    bounded = dataclasses.replace(batch, context_lens=[1024] * 3)
    given = []

    def empty(*size: int, **options: Any) -> Tensor:
        given.append(torch.full(size, torch.nan, **options))
        return given[-1]

    monkeypatch.setattr(torch, "empty", empty)
    got = paged.attention(q, ours, plans.plan(bounded, ours), scale=0.25, window=30)
    monkeypatch.undo()
    torch.testing.assert_close(got, oracle.attention(q, theirs, oracle.plan(batch, theirs), scale=0.25, window=30))
    written = given[0].isfinite().flatten(1).any(1).view(3, 16)
    assert [row.nonzero().flatten().tolist() for row in written] == [[0, 1], [4], [0]]


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered", "ignore:invalid value encountered")  # numpy, which interprets
def test_a_row_that_is_not_a_number_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    split_at(64, monkeypatch)
    ours, _, tables = caches(LayerState(1, 16, 16), [150, 150], 16, torch.float32)
    q = torch.randn(2, 3, 16)
    q[1] = torch.nan
    got = paged.attention(q, ours, plans.plan(make_batch(tables, [1, 1], [150, 150], 16), ours), scale=0.25)
    assert got[0].isfinite().all() and got[1].isnan().all()


def angles(rows: int, rot: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    theta = torch.rand(rows, 1, rot // 2) * 6
    if interleaved:
        return theta.cos().repeat_interleave(2, -1), torch.stack([-theta.sin(), theta.sin()], -1).flatten(-2)
    return theta.cos().repeat(1, 1, 2), torch.cat([-theta.sin(), theta.sin()], -1)


FLOATS = [torch.float32, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", [*FLOATS, layouts.Q8_0], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "length", "rot"), [(3, 1, 32, 32), (4, 2, 96, 24)])
def test_place(heads: int, kv_heads: int, length: int, rot: int, interleaved: bool, dtype: torch.dtype) -> None:
    """One launch is the reference's norms, rope, temperature and writing; the last row has no slot."""
    torch.manual_seed(0)
    state, eps = LayerState(kv_heads, length, 64), 1e-6
    rows, slots = 4, torch.tensor([37, 3, 16, -1])
    parts = [heads * length, kv_heads * length, kv_heads * 64]
    joined = torch.randn(rows, sum(parts))
    positions, temper = torch.tensor([5, 0, 9, 2]), torch.rand(rows) + 0.5
    q_norm, k_norm = torch.randn(length), torch.randn(length)
    angles_of = torch.rand(10, rot // 2) * 6
    table = torch.cat([angles_of.cos(), angles_of.sin()], 1)
    theta = angles_of[positions].unsqueeze(1)
    cos, sin = theta.cos(), theta.sin()
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)
    else:
        cos, sin = cos.repeat(1, 1, 2), torch.cat([-sin, sin], -1)
    shapes = ((heads, length), (kv_heads, length), (kv_heads, 64))
    q, k, v = (part.unflatten(1, shape).clone() for part, shape in zip(joined.split(parts, 1), shapes, strict=True))
    q, k = reference.rms_norm(q, q_norm, eps), reference.rms_norm(k, k_norm, eps)
    reference.rope(q, k, cos, sin, interleaved)
    theirs = reference.new_cache(state, 3, 16, torch.float32, CPU)
    reference.write_kv(k, v, theirs, slots[:3])

    ours = layouts.new_cache(state, 3, 16, dtype, CPU)
    turn = place.Turn(table, interleaved, q_norm, k_norm, eps)
    got = place.place(joined.clone(), heads, turn, positions, temper, ours, slots)
    torch.testing.assert_close(got, q * temper.view(-1, 1, 1), rtol=0, atol=4e-6)
    apart = layouts.new_cache(state, 3, 16, dtype, CPU)
    place.write_kv(k, v, apart, slots[:3])
    for cache in (ours, apart):
        for store, want in ((cache.key, theirs.key), (cache.value, theirs.value)):
            want = want.transpose(1, 2)
            if dtype == layouts.Q8_0:
                width = want.shape[3]
                codes = store[..., :width].view(torch.int8).float().unflatten(3, (-1, 32))
                steps = store[..., width:].contiguous().view(torch.float16).float()
                groups = want.unflatten(3, (-1, 32))
                error = (codes * steps.unsqueeze(4) - groups).abs()
                # half a step, and up to 127 roundings of the step to float16 at the largest code
                assert (error <= steps.unsqueeze(4) * (0.5 + 127 * 2**-11) + 1e-6).all()
            else:
                torch.testing.assert_close(
                    store.float(), want, rtol=torch.finfo(dtype).eps, atol=2**-9 if dtype.itemsize == 1 else 4e-6
                )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, layouts.Q8_0], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 21, "cap": 3.0, "sinks": True}], ids=str)
def test_byte_caches(dtype: torch.dtype, options: dict[str, float | bool]) -> None:
    """Read as what they hold: the reference gets the same rounded keys and values as floats."""
    torch.manual_seed(0)
    queries, contexts, block = [1, 20], [70, 50], 16
    state = LayerState(2, 32, 64)
    ours, theirs = layouts.new_cache(state, 12, block, dtype, CPU), reference.new_cache(state, 12, block, torch.float32, CPU)
    tables = [[3, 9, 1, 7, 5], [2, 8, 4, 6]]
    for table, length in zip(tables, contexts, strict=True):
        slots = make_batch([table], [length], [length], block).slot_mapping
        place.write_kv(torch.randn(length, 2, 32), torch.randn(length, 2, 64), ours, slots)
    for store, target in ((ours.key, theirs.key), (ours.value, theirs.value)):
        width = target.shape[3]
        values = store.float()
        if dtype == layouts.Q8_0:
            steps = store[..., width:].contiguous().view(torch.float16).float()
            values = (store[..., :width].view(torch.int8).float().unflatten(3, (-1, 32)) * steps.unsqueeze(4)).flatten(3)
        target.copy_(values.transpose(1, 2))
    q = torch.randn(sum(queries), 4, 32)
    sinks = torch.randn(4) if options.get("sinks") else None
    compare(q, make_batch(tables, queries, contexts, block), ours, theirs, 2e-6, **{**options, "scale": 0.2, "sinks": sinks})


def test_what_fp8_cannot_hold() -> None:
    """Becomes the largest that it can; none stays none."""
    state, slots = LayerState(1, 16, 16), torch.tensor([2])
    k = torch.tensor([440.0, 449.0, 1e9, math.inf, -math.inf, -464.1, math.nan, 2**-10]).repeat(2).view(1, 1, 16)
    ours, theirs = (module.new_cache(state, 1, 16, torch.float8_e4m3fn, CPU) for module in (layouts, reference))
    place.write_kv(k, -k, ours, slots)
    reference.write_kv(k, -k, theirs, slots)
    want = [448.0, 448.0, 448.0, 448.0, -448.0, -448.0, math.nan, 0.0] * 2  # 440 lies between 416 and 448
    for sign, *stores in ((1, ours.key[0, 0, 2], theirs.key[0, 2, 0]), (-1, ours.value[0, 0, 2], theirs.value[0, 2, 0])):
        for store in stores:
            torch.testing.assert_close(store.float(), sign * torch.tensor(want), rtol=0, atol=0, equal_nan=True)


def test_heads_that_q8_0_cannot_hold() -> None:
    with pytest.raises(UnsupportedModel, match="multiple of 32, not 80 and 80"):
        layouts.new_cache(LayerState(1, 80, 80), 1, 16, layouts.Q8_0, CPU)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope(interleaved: bool) -> None:
    """The heads are parts of one projection's rows."""
    torch.manual_seed(0)
    joined = torch.randn(4, 6 * 40)
    cos, sin = angles(4, 24, interleaved)
    q, k = (part.unflatten(1, (-1, 40)) for part in joined.clone().split([160, 80], 1))
    reference.rope(q, k, cos, sin, interleaved)
    q1, k1 = (part.unflatten(1, (-1, 40)) for part in joined.clone().split([160, 80], 1))
    turning.rope(q1, k1, cos, sin, interleaved)
    torch.testing.assert_close(q1, q, rtol=0, atol=1e-6)
    torch.testing.assert_close(k1, k, rtol=0, atol=1e-6)
