"""Checks of the paged KV cache and of attention, against a float64 softmax and against themselves in other batches."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ollamapy import cpu_kernels
from ollamapy.engine.batch import Batch, KVCache, LayerState
from ollamapy.gguf.types import GGMLType
from ollamapy.quant.dequant import dequantize
from ollamapy.reference import q8_0_blocks
from tests.models.paged import make_batch
from tests.ops.test_attention import naive

ROUNDING = 2.0**-24
LENGTHS = [1, 15, 16, 17, 255, 256, 257, 31, 700]  # around the edges of blocks (16), query tiles (32) and chunks (256)


@dataclass
class Sequences:
    """Queries, keys and values of some sequences, as the cache rounds them, and a cache that holds them among NaN."""

    q: list[Tensor]  # (T, H, D) each
    k: list[Tensor]
    v: list[Tensor]
    tables: list[list[int]]
    cache: KVCache

    def batch(self, chosen: list[int], query_lens: list[int], context_lens: list[int]) -> tuple[Tensor, Batch]:
        rows = [self.q[s][c - n : c] for s, n, c in zip(chosen, query_lens, context_lens, strict=True)]
        return torch.cat(rows), make_batch([self.tables[s] for s in chosen], query_lens, context_lens, 16)

    def run(self, chosen: list[int], query_lens: list[int], context_lens: list[int], **options: Any) -> list[Tensor]:
        q, batch = self.batch(chosen, query_lens, context_lens)
        return list(cpu_kernels.attention(q, self.cache, batch, **options).split(query_lens))


def make(
    lengths: list[int],
    heads: tuple[int, int] = (4, 2),
    head_lengths: tuple[int, int] = (32, 48),
    dtype: torch.dtype = torch.float32,
) -> Sequences:
    generator = torch.Generator().manual_seed(0)
    num_blocks = sum(-(-length // 16) for length in lengths) + 3
    free = list(range(num_blocks))
    random.Random(0).shuffle(free)
    cache = cpu_kernels.new_cache(LayerState(heads[1], *head_lengths), num_blocks, 16, dtype, torch.device("cpu"))
    assert not cache.key.any() and not cache.value.any()
    for store in (cache.key, cache.value):
        store.fill_(255 if dtype is torch.uint8 else torch.nan)
    s = Sequences([], [], [], [], cache)
    for length in lengths:
        s.tables.append([free.pop() for _ in range(-(-length // 16))])
        s.q.append(torch.randn(length, heads[0], head_lengths[0], generator=generator))
        k, v = (torch.randn(length, heads[1], d, generator=generator) for d in head_lengths)
        batch = make_batch([s.tables[-1]], [length], [length], 16)
        cpu_kernels.write_kv(k, v, cache, batch.slot_mapping)
        s.k.append(held(k, dtype))
        s.v.append(held(v, dtype))
    return s


def held(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache of this type keeps of x; uint8 is q8_0."""
    return dequantize(q8_0_blocks(x), GGMLType.Q8_0, x.shape) if dtype is torch.uint8 else x.to(dtype).float()


def bound(s: Sequences, i: int, **options: Any) -> Tensor:
    """Of a float32 answer's error. A chain of n roundings strays by less than 8 sqrt(n) of them (Higham and Mary 2019: but for
    a chance of 1e-13); an error of a score moves its weight by twice that relatively; exp and tanh are good to 4 roundings.
    A scale of q8_0 is one rounding more for each term of either sum."""
    length, heads, d = s.q[i].shape
    scaled = 2**0.5 if s.cache.key.dtype is torch.uint8 else 1.0
    k = s.k[i].repeat_interleave(heads // s.k[i].shape[1], 1)
    score = float(torch.einsum("qhd,khd->hqk", s.q[i].abs(), k.abs()).max()) * options["scale"]
    moved = 2 * (scaled * 8 * d**0.5 * score + 8 * options.get("cap", 0.0) + 8)
    magnitude = Sequences(s.q, s.k, [v.abs() for v in s.v], s.tables, s.cache)
    return (moved + scaled * 8 * length**0.5) * ROUNDING * naive(magnitude, i, **options) + 1e-37  # type: ignore[arg-type]


SINKS = torch.tensor([0.5, -1.0, 3.0, 0.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "window-1": {"window": 1},
    "window-256": {"window": 256},
    "window-257": {"window": 257},
    "cap": {"cap": 2.0},
    "sinks": {"sinks": SINKS},
    "all": {"cap": 3.0, "window": 37, "sinks": SINKS},
    "both-sides": {"causal": False},
    "both-sides-window": {"causal": False, "window": 21},
}


def _check(s: Sequences, **options: Any) -> float:
    lengths, worst = [len(q) for q in s.q], 0.0
    for i, out in enumerate(s.run(list(range(len(lengths))), lengths, lengths, **options)):
        error = (out.double() - naive(s, i, **options)).abs()  # type: ignore[arg-type]
        worst = max(worst, float((error / bound(s, i, **options)).max()))
        assert worst <= 1.0, (lengths[i], options, worst)
    return worst


def check_options() -> float:
    s, q8 = make(LENGTHS), make(LENGTHS, head_lengths=(32, 96), dtype=torch.uint8)
    worst = max(_check(q8, scale=0.2, **OPTIONS[name]) for name in ("plain", "all", "both-sides-window"))
    return max(worst, *(_check(s, scale=0.2, **options) for options in OPTIONS.values()))


def check_shapes() -> float:
    """Head lengths of 16 to 256, groups of 1 to 9 query heads, every type of cache."""
    dtypes = itertools.cycle((torch.float16, torch.bfloat16, torch.float32))
    worst = 0.0
    for length in (16, 17, 36, 40, 48, 64, 72, 80, 96, 100, 128, 192, 255, 256):
        worst = max(worst, _check(make([1, 33, 300], (2, 1), (length, 272 - length), next(dtypes)), scale=length**-0.5))
    for length in (32, 64, 96, 128, 256):
        worst = max(worst, _check(make([1, 33, 300], (2, 1), (length, 288 - length), torch.uint8), scale=length**-0.5))
    for group in range(1, 10):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            worst = max(worst, _check(make([40, 1, 18], (2 * group, 2), (16, 32), dtype), scale=0.3, window=30))
        worst = max(worst, _check(make([40, 1, 18], (2 * group, 2), (32, 64), torch.uint8), scale=0.3, window=30))
    return worst


def check_batches_and_chunks() -> None:
    """In chunks, beside other sequences, one row at a time, on any number of threads: no bit of a row changes."""
    lengths = [600, 70, 291]
    cases = [(name, torch.float16) for name in ("plain", "window", "window-257", "cap", "sinks", "all")]
    for name, dtype in (*cases, ("plain", torch.uint8), ("all", torch.uint8)):
        heads = (32, 96) if dtype is torch.uint8 else (36, 100)
        s, options = make(lengths, head_lengths=heads, dtype=dtype), {"scale": 0.2, **OPTIONS[name]}
        whole = s.run([0, 1, 2], lengths, lengths, **options)
        for cuts in ([0, 1, 8, 9, 130, 257, 600], [0, 255, 256, 513, 600], [0, 599, 600]):
            for start, stop in itertools.pairwise(cuts):
                assert torch.equal(s.run([0], [stop - start], [stop], **options)[0], whole[0][start:stop]), (name, start, stop)
        for context in (1, 50, 70):
            rows = s.run([2, 0, 1], [1, 1, 1], [291, 600, context], **options)
            assert torch.equal(rows[0], whole[2][290:])
            assert torch.equal(rows[1], whole[0][599:])
            assert torch.equal(rows[2], whole[1][context - 1 : context])
        mixed = s.run([1, 0, 2], [1, 33, 291], [70, 590, 291], **options)
        assert torch.equal(torch.cat(mixed), torch.cat((whole[1][69:], whole[0][557:590], whole[2])))
        for threads in (1, 3):
            cpu_kernels.kernels().set_threads(threads)
            assert torch.equal(torch.cat(s.run([0, 1, 2], lengths, lengths, **options)), torch.cat(whole))
        cpu_kernels.kernels().set_threads(2)


def check_chunks_shared_out() -> None:
    """Where threads share the keys of a head they leave no bit: 1 to 4 threads, 1 to 5 KV heads, 1 to 4 rows of a sequence."""
    for heads, options in (
        ((3, 1), {}),
        ((9, 3), {"window": 300}),
        ((4, 1), {"sinks": SINKS, "cap": 2.0, "window": 257}),
        ((5, 5), {"causal": False}),
    ):
        for dtype, head_lengths in ((torch.float16, (40, 72)), (torch.uint8, (32, 64))):
            s = make([1100, 513], heads, head_lengths, dtype)
            cpu_kernels.kernels().set_threads(1)
            ones = [s.run([i], [len(s.q[i])], [len(s.q[i])], scale=0.2, **options)[0] for i in range(2)]
            for threads in (1, 2, 3, 4):
                cpu_kernels.kernels().set_threads(threads)
                for rows in (1, 2, 4, 5):
                    alone = s.run([0], [rows], [1100], scale=0.2, **options)[0]
                    assert torch.equal(alone, ones[0][1100 - rows :]), (heads, dtype, threads, rows)
                both = s.run([1, 0], [1, 2], [513, 1100], scale=0.2, **options)
                assert torch.equal(both[0], ones[1][512:]) and torch.equal(both[1], ones[0][1098:]), (heads, dtype, threads)
            cpu_kernels.kernels().set_threads(2)


def check_write_kv() -> None:
    """Rows go to their slots in the cache's type, rounded to nearest even; other slots and rows beyond the slots stay."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cache = cpu_kernels.new_cache(LayerState(2, 20, 37), 3, 16, dtype, torch.device("cpu"))
        cache.key.fill_(-1.0)
        cache.value.fill_(-1.0)
        k, v = torch.randn(5, 2, 20) * 3, torch.randn(5, 2, 37)
        # overflow, the largest half, ties, subnormals, zeros of both signs
        k[0, 0, :8] = torch.tensor([7e4, 65519.0, 1.0 + 2**-11, 1.0 + 3 * 2**-11, 2**-25, 3e-8, -0.0, -7e4])
        k[1, 0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0 + 2**-8])
        k[2, 0, :4] = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000 - (1 << 32)]).int().view(torch.float32)  # NaN all
        slots = torch.tensor([33, 0, 15, 47])
        cpu_kernels.write_kv(k, v, cache, slots)
        keys = cache.key.permute(0, 3, 1, 2).reshape(48, 2, 20)
        values = cache.value.permute(0, 2, 1, 3).reshape(48, 2, 37)
        torch.testing.assert_close(keys[slots], k[:4].to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(keys[33]), torch.signbit(k[0]))
        assert torch.equal(values[slots], v[:4].to(dtype))
        rest = [slot for slot in range(48) if slot not in slots.tolist()]
        assert (keys[rest] == -1.0).all() and (values[rest] == -1.0).all()


def check_write_q8_0() -> None:
    """The bits are the reference's: plain rows, tiny ones down to where the scale is a subnormal half or none, and bad ones."""
    cache = cpu_kernels.new_cache(LayerState(2, 64, 32), 3, 16, torch.uint8, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(40, 2, 64, generator=generator), torch.randn(40, 2, 32, generator=generator)
    for i in range(40):
        k[i, 1] *= 10.0 ** (i % 11 - 7)
    k[0, 0, 5], k[1, 0, 40], k[2, 0, 3], v[3, 1, 0] = torch.nan, torch.inf, 1e30, -torch.inf
    k[4], v[5, 0, 1:] = 0.0, 0.0
    slots = torch.randperm(48, generator=generator)[:40]
    cpu_kernels.write_kv(k, v, cache, slots)
    for store, new, keys in ((cache.key, k, True), (cache.value, v, False)):
        blocks = q8_0_blocks(new).view(40, 2, -1, 34)
        quants, scales = (
            store[..., :512],
            store[..., 512:].contiguous().view(torch.float16),
        )  # (blocks, heads, groups, 512 or 16)
        by_token = quants.unflatten(-1, (32, 16)).movedim(-1, 1) if keys else quants.unflatten(-1, (16, 32)).movedim(-2, 1)
        assert torch.equal(by_token.flatten(0, 1)[slots], blocks[..., 2:])
        expected = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        torch.testing.assert_close(scales.movedim(-1, 1).flatten(0, 1)[slots], expected, rtol=0, atol=0, equal_nan=True)
        rest = [slot for slot in range(48) if slot not in slots.tolist()]
        assert not by_token.flatten(0, 1)[rest].any() and not scales.movedim(-1, 1).flatten(0, 1)[rest].any()
    good = torch.ones(40, dtype=torch.bool)
    good[:4] = False  # half a step, of max|x| / 127 as a half: exact to 2^-11, or to 2^-25 where that is subnormal
    step = k[good].view(-1, 32).abs().amax(1, keepdim=True) / 127
    error = (held(k[good], torch.uint8) - k[good]).view(-1, 32).abs()
    assert (error <= step * (0.5 + 2**-11) + 127 * 2**-25).all()
    plain = k[good].view(-1, 32).abs().amax(1) > 127 * 2**-14
    assert (error[plain] <= step[plain] * (0.5 + 2**-11)).all()


def check_nan_in_a_sequence() -> None:
    """A sequence with NaN among its values harms no other sequence of the batch."""
    lengths = [40, 20]
    s = make(lengths)
    whole = s.run([0, 1], lengths, lengths, scale=0.2)
    marred = s.tables[0][1]
    s.cache.key[marred], s.cache.value[marred] = torch.nan, torch.inf
    got = s.run([0, 1], lengths, lengths, scale=0.2)
    assert torch.equal(got[1], whole[1]) and not torch.isfinite(got[0][-1]).any()


def check_later_infinities() -> None:
    """What a row cannot see may be infinite or NaN: later tokens of its own chunk of a prompt, and those before its window."""
    for dtype in (torch.float32, torch.float16, torch.uint8):
        for heads, options in (((4, 2), {}), ((4, 1), {"window": 5}), ((9, 1), {}), ((3, 1), {"cap": 2.0})):
            s = make([300], heads, (32, 96) if dtype is torch.uint8 else (36, 100), dtype)
            whole = s.run([0], [300], [300], scale=0.2, **options)[0]
            for at, value in ((41, torch.inf), (258, torch.nan), (299, -torch.inf)):
                batch = make_batch(s.tables, [300], [300], 16)
                k, v = s.k[0].clone(), s.v[0].clone()
                v[at] = value
                cpu_kernels.write_kv(k, v, s.cache, batch.slot_mapping)
                got = s.run([0], [300], [300], scale=0.2, **options)[0]
                seen = at + options.get("window", 300)  # type: ignore[operator]
                assert torch.equal(got[:at], whole[:at]) and torch.equal(got[seen:], whole[seen:]), (dtype, heads, options, at)
                assert not got[at:seen].isfinite().any()
                for rows in (1, 3, 7):
                    alone = s.run([0], [rows], [at], scale=0.2, **options)[0]
                    assert torch.equal(alone, whole[at - rows : at])


def checks() -> list[Any]:
    return [
        check_options,
        check_shapes,
        check_batches_and_chunks,
        check_chunks_shared_out,
        check_write_kv,
        check_write_q8_0,
        check_nan_in_a_sequence,
        check_later_infinities,
    ]
