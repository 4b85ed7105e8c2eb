"""Paged attention against a float64 softmax over dense keys, and bit for bit against itself in other batches."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from ollamapy import ops, reference
from ollamapy.engine.batch import Batch, KVCache, LayerState
from ollamapy.reference import attention as paged
from tests.models.paged import make_batch


@dataclass
class Sequences:
    """Dense keys, values and queries of some sequences, and a cache that holds them in shuffled blocks among NaN."""

    q: list[Tensor]  # (T, H, D) each
    k: list[Tensor]
    v: list[Tensor]
    tables: list[list[int]]
    cache: KVCache
    block_size: int

    def batch(self, chosen: list[int], query_lens: list[int], context_lens: list[int]) -> tuple[Tensor, Batch]:
        rows = [self.q[s][c - n : c] for s, n, c in zip(chosen, query_lens, context_lens, strict=True)]
        return torch.cat(rows), make_batch([self.tables[s] for s in chosen], query_lens, context_lens, self.block_size)


def make(
    lengths: list[int], heads: int = 4, kv_heads: int = 2, key_length: int = 16, value_length: int = 24, block_size: int = 16
) -> Sequences:
    torch.manual_seed(0)
    num_blocks = sum(-(-length // block_size) for length in lengths) + 3
    free = list(range(num_blocks))
    random.Random(0).shuffle(free)
    cache = KVCache(
        torch.full((num_blocks, block_size, kv_heads, key_length), torch.nan),
        torch.full((num_blocks, block_size, kv_heads, value_length), torch.nan),
    )
    sequences = Sequences([], [], [], [], cache, block_size)
    for length in lengths:
        sequences.tables.append([free.pop() for _ in range(-(-length // block_size))])
        sequences.q.append(torch.randn(length, heads, key_length))
        sequences.k.append(torch.randn(length, kv_heads, key_length))
        sequences.v.append(torch.randn(length, kv_heads, value_length))
        batch = make_batch([sequences.tables[-1]], [length], [length], block_size)
        ops.write_kv(sequences.k[-1], sequences.v[-1], cache, batch.slot_mapping)
    return sequences


def naive(s: Sequences, i: int, **options: Any) -> Tensor:
    """(T, H * Dv) float64 for all positions of a sequence at once."""
    q, k, v = s.q[i].double(), s.k[i].double(), s.v[i].double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * options["scale"]
    if cap := options.get("cap", 0.0):
        scores = cap * torch.tanh(scores / cap)
    position = torch.arange(q.shape[0])
    distance = position[:, None] - position[None, :]
    window = options.get("window", 0)
    if options.get("causal", True):
        hidden = (distance < 0) | (distance >= window if window else torch.zeros_like(distance, dtype=torch.bool))
    else:
        hidden = distance.abs() > window // 2 if window else torch.zeros_like(distance, dtype=torch.bool)
    scores = scores.masked_fill(hidden, -torch.inf)
    if (sinks := options.get("sinks")) is not None:
        extra = sinks.double().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def run(s: Sequences, chosen: list[int], query_lens: list[int], context_lens: list[int], **options: Any) -> list[Tensor]:
    q, batch = s.batch(chosen, query_lens, context_lens)
    out = ops.attention(ops.pad_rows(q), s.cache, ops.plan_attention(batch, s.cache), **options)
    assert not out[batch.num_tokens :].any()
    return list(out[: batch.num_tokens].split(query_lens))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "window-1": {"window": 1},
    "window-129": {"window": 129},
    "cap": {"cap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "all": {"cap": 3.0, "window": 37, "sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
    "both-sides": {"causal": False},
    "both-sides-window": {"causal": False, "window": 21},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_whole_sequences(name: str) -> None:
    lengths = [1, 15, 16, 17, 128, 129, 300]
    s, options = make(lengths), {"scale": 0.2, **OPTIONS[name]}
    for i, out in enumerate(run(s, list(range(7)), lengths, lengths, **options)):
        torch.testing.assert_close(out.double(), naive(s, i, **options), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in OPTIONS if not name.startswith("both")])
def test_any_split_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, beside other sequences, one row at a time, and with little memory: no bit of a row changes."""
    lengths = [300, 70, 131]
    s, options = make(lengths), {"scale": 0.2, **OPTIONS[name]}
    whole = run(s, [0, 1, 2], lengths, lengths, **options)
    for cuts in ([0, 1, 8, 9, 130, 257, 300], [0, 127, 128, 300], [0, 299, 300]):
        for start, stop in itertools.pairwise(cuts):
            alone = run(s, [0], [stop - start], [stop], **options)[0]
            assert torch.equal(alone, whole[0][start:stop]), (start, stop)
    for context in (1, 50, 70):
        rows = run(s, [2, 0, 1], [1, 1, 1], [131, 300, context], **options)
        assert torch.equal(rows[0], whole[2][130:131])
        assert torch.equal(rows[1], whole[0][299:300])
        assert torch.equal(rows[2], whole[1][context - 1 : context])
    mixed = run(s, [1, 0, 2], [1, 33, 131], [70, 290, 131], **options)
    assert torch.equal(torch.cat(mixed), torch.cat((whole[1][69:], whole[0][257:290], whole[2])))
    monkeypatch.setattr(paged, "MAX_TILE_BYTES", 1)
    assert torch.equal(torch.cat(run(s, [0, 1, 2], lengths, lengths, **options)), torch.cat(whole))


def test_both_sides_do_not_depend_on_batch_mates() -> None:
    lengths = [300, 70, 131]
    s, options = make(lengths), {"scale": 0.2, "causal": False, "window": 50}
    whole = run(s, [0, 1, 2], lengths, lengths, **options)
    for i, length in enumerate(lengths):
        assert torch.equal(run(s, [i], [length], [length], **options)[0], whole[i])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 1), (9, 3), (8, 8), (5, 5)])
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_head_groups_and_blocks(heads: int, kv_heads: int, block_size: int) -> None:
    lengths = [33, 5, 140]
    s = make(lengths, heads, kv_heads, key_length=8, value_length=8, block_size=block_size)
    for i, out in enumerate(run(s, [0, 1, 2], lengths, lengths, scale=0.3)):
        torch.testing.assert_close(out.double(), naive(s, i, scale=0.3), rtol=1e-5, atol=2e-6)
    decoded = run(s, [0, 1, 2], [1, 1, 1], lengths, scale=0.3)
    for i, out in enumerate(decoded):
        torch.testing.assert_close(out.double(), naive(s, i, scale=0.3)[-1:], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cache_in_half_precision(dtype: torch.dtype) -> None:
    """Values are those of the rounded keys and values, computed in float32."""
    s = make([100])
    s.cache = KVCache(s.cache.key.to(dtype), s.cache.value.to(dtype))
    s.k, s.v = [s.k[0].to(dtype).float()], [s.v[0].to(dtype).float()]
    out = run(s, [0], [100], [100], scale=0.2)[0]
    torch.testing.assert_close(out.double(), naive(s, 0, scale=0.2), rtol=1e-5, atol=2e-6)


def test_cache_in_q8_0() -> None:
    """Values are those of keys and values that gguf-py decodes from the blocks; these are near those written."""
    s = make([100], key_length=64, value_length=32)
    plain = s.k[0], s.v[0]
    s.cache = reference.new_cache(LayerState(2, 64, 32), s.cache.key.shape[0], 16, torch.uint8, torch.device("cpu"))
    batch = make_batch(s.tables, [100], [100], 16)
    ops.write_kv(*plain, s.cache, batch.slot_mapping)
    held = [
        torch.from_numpy(gguf.dequantize(store.flatten(0, 1)[batch.slot_mapping].numpy(), gguf.GGMLQuantizationType.Q8_0))
        for store in (s.cache.key, s.cache.value)
    ]
    for before, after in zip(plain, held, strict=True):
        step = before.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        assert ((after - before).unflatten(-1, (-1, 32)).abs() <= step * (0.5 + 2**-11)).all()
    s.k, s.v = [held[0]], [held[1]]
    out = run(s, [0], [100], [100], scale=0.2)[0]
    torch.testing.assert_close(out.double(), naive(s, 0, scale=0.2), rtol=1e-5, atol=2e-6)


def test_write_kv_leaves_other_slots_and_padding_rows_alone() -> None:
    cache = KVCache(torch.full((4, 2, 1, 3), -1.0), torch.full((4, 2, 1, 3), -1.0))
    k, v = torch.arange(12.0).view(4, 1, 3), torch.arange(12.0).view(4, 1, 3) + 100
    ops.write_kv(k, v, cache, torch.tensor([6, 1, 3]))
    assert torch.equal(cache.key.view(8, 3)[[6, 1, 3]], k[:3, 0])
    assert torch.equal(cache.value.view(8, 3)[[6, 1, 3]], v[:3, 0])
    assert (cache.key.view(8, 3)[[0, 2, 4, 5, 7]] == -1.0).all()
