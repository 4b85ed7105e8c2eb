"""Sampling on the device: penalties, argmax, filters without a sort of the vocabulary, draws, log-probabilities.

A row is one program's, so its token depends on its logits, parameters, seed and step alone. The k likeliest are found by a
radix search on the bits of the logits (four passes of 256 bins), gathered in order of their ids, and only they are sorted.
Filters are `engine.filters`' in their order: top-k, top-p, min-p, then temperature. Random numbers are Philox (Salmon et al.
2011).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits at a time
CANDIDATES = 1024  # most that are sorted: top_k above it, and typical_p, are the host's


@triton.jit
def _ordered(x):
    """float32 -> int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _logits(logits, row, base, size, BLOCK: tl.constexpr):
    i = base + tl.arange(0, BLOCK)
    return i, tl.load(logits + row * size + i, i < size, other=float("-inf"))


@triton.jit
def penalty_kernel(logits, rows, ids, times, factors, count, size, SIZE: tl.constexpr):
    """factors (rows, 3): repeat, frequency, presence."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = i < count
    row = tl.load(rows + i, live, other=0)
    at = logits + row * size + tl.load(ids + i, live, other=0)
    value = tl.load(at, live, other=0.0)
    repeat = tl.load(factors + row * 3, live, other=1.0)
    less = tl.load(times + i, live, other=0.0) * tl.load(factors + row * 3 + 1, live, other=0.0)
    less += tl.load(factors + row * 3 + 2, live, other=0.0)
    tl.store(at, tl.where(value <= 0, value * repeat, value / repeat) - less, live)


@triton.jit
def uniform_kernel(seeds, steps, out):
    row = tl.program_id(0)
    tl.store(out + row, tl.rand(tl.load(seeds + row), tl.load(steps + row)))


@triton.jit
def draw_kernel(logits, temperatures, seeds, steps, tokens, size, BLOCK: tl.constexpr):
    """The likeliest token, or at a temperature above 0 one of softmax(row / temperature): the likeliest after Gumbel noise.

    -1 for a row whose largest logit is not finite.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    seed = tl.load(seeds + row) + tl.load(steps + row).to(tl.int64) * 1000003
    best = float("-inf")
    token = -1
    whole = float("-inf")
    for base in range(0, size, BLOCK):
        i, x = _logits(logits, row, base, size, BLOCK)
        x = tl.where(x == x, x, float("inf"))
        whole = tl.maximum(whole, tl.max(x, 0))
        score = x
        if temperature > 0.0:
            score = x / temperature - tl.log(-tl.log(tl.maximum(tl.rand(seed, i), 1e-10)))
        most = tl.max(score, 0)
        first = tl.min(tl.where(score == most, i, size), 0)
        if most > best:
            best = most
            token = first
    finite = (whole > float("-inf")) & (whole < float("inf"))
    tl.store(tokens + row, tl.where(finite, token, -1))


@triton.jit
def logprob_kernel(logits, tokens, out, size, BLOCK: tl.constexpr):
    """log softmax(row)[token], and the row's log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    best = float("-inf")
    total = 0.0
    for base in range(0, size, BLOCK):
        _, x = _logits(logits, row, base, size, BLOCK)
        higher = tl.maximum(best, tl.max(x, 0))
        near = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(best - near) + tl.sum(tl.exp(x - near), 0)
        best = higher
    whole = best + tl.log(total)
    token = tl.maximum(tl.load(tokens + row), 0)
    tl.store(out + row * 2, tl.load(logits + row * size + token) - whole)
    tl.store(out + row * 2 + 1, whole)


@triton.jit
def filter_kernel(
    logits,
    top_ks,
    top_ps,
    min_ps,
    temperatures,
    seeds,
    steps,
    tokens,
    beyond,
    scratch,
    size,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """A token of each row, drawn from its filtered candidates; -1 where the largest logit is not finite.

    `scratch` (rows, CANDIDATES) int64. beyond: whether top-p or min-p of a row without top-k reached the last candidate, so
    that more than CANDIDATES might count; then the host decides.
    """
    row = tl.program_id(0).to(tl.int64)
    asked = tl.load(top_ks + row)
    limited = (asked > 0) & (asked <= CANDIDATES)
    count = tl.minimum(tl.where(limited, asked, CANDIDATES), size)
    bins = tl.arange(0, 256)
    best = float("-inf")
    total = 0.0
    prefix = tl.zeros((), tl.int64)
    needed = count
    for digit in tl.static_range(4):
        found = tl.zeros((256,), tl.int32)
        for base in range(0, size, BLOCK):
            i, x = _logits(logits, row, base, size, BLOCK)
            if digit == 0:
                higher = tl.maximum(best, tl.max(tl.where(x == x, x, float("inf")), 0))
                near = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(best - near) + tl.sum(tl.exp(x - near), 0)
                best = higher
            key = _ordered(x).to(tl.int64) + 2147483648
            among = (i < size) & ((key >> (32 - 8 * digit)) == prefix)
            found += tl.histogram(((key >> (24 - 8 * digit)) & 255).to(tl.int32), 256, mask=among)
        reached = tl.cumsum(found, 0, reverse=True)  # how many are in a bin or a higher one
        bin = tl.max(tl.where(reached >= needed, bins, 0), 0)
        needed -= tl.sum(tl.where(bins > bin, found, 0), 0)
        prefix = prefix * 256 + bin
    held = 0
    ties = 0
    for base in range(0, size, BLOCK):
        i, x = _logits(logits, row, base, size, BLOCK)
        key = _ordered(x).to(tl.int64) + 2147483648
        same = ((key == prefix) & (i < size)).to(tl.int32)
        order = ties + tl.cumsum(same, 0)
        taken = ((key > prefix) & (i < size)) | ((same > 0) & (order <= needed))
        place = held + tl.cumsum(taken.to(tl.int32), 0) - 1
        packed = (_ordered(x).to(tl.int64) << 32) | (2147483647 - i).to(tl.int64)
        tl.store(scratch + row * CANDIDATES + place, packed, taken)
        held += tl.sum(taken.to(tl.int32), 0)
        ties += tl.sum(same, 0)
    tl.debug_barrier()
    slot = tl.arange(0, CANDIDATES)
    packed = tl.load(scratch + row * CANDIDATES + slot, slot < count, other=-9223372036854775807)
    packed = tl.sort(packed, descending=True)
    ids = 2147483647 - (packed & 0xFFFFFFFF).to(tl.int32)
    value = _ordered((packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)).to(tl.float32, bitcast=True)
    kept = slot < count
    weight = tl.where(kept, tl.exp(value - best), 0.0)
    if limited:
        total = tl.sum(weight, 0)
    before = tl.cumsum(weight, 0) - weight
    top_p = tl.load(top_ps + row)
    kept &= (before < tl.where(top_p >= 1.0, float("inf"), top_p * total)) | (slot == 0)
    kept &= weight >= tl.minimum(tl.load(min_ps + row), 1.0)
    temperature = tl.load(temperatures + row)
    warm = tl.where(temperature > 0.0, temperature, 1.0)
    share = tl.where(kept, tl.exp((value - best) / warm), 0.0)
    running = tl.cumsum(share, 0)
    target = tl.rand(tl.load(seeds + row), tl.load(steps + row)) * tl.sum(share, 0)
    picked = tl.minimum(tl.sum((kept & (running <= target)).to(tl.int32), 0), tl.sum(kept.to(tl.int32), 0) - 1)
    picked = tl.where(temperature > 0.0, picked, 0)
    token = tl.sum(tl.where(slot == picked, ids, 0), 0)
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(tokens + row, tl.where(finite, token, -1))
    last = tl.sum((kept & (slot == count - 1)).to(tl.int32), 0)
    tl.store(beyond + row, (last > 0) & (count < size) & (asked <= 0))


class Choices(NamedTuple):
    """How rows are sampled, (n,) each, on the device."""

    temperature: Tensor  # float32; <= 0: the likeliest
    top_k: Tensor  # int32; <= 0: no limit
    top_p: Tensor  # float32; >= 1: all
    min_p: Tensor  # float32; <= 0: all
    seed: Tensor  # int64, the request's
    step: Tensor  # int32, tokens generated before


def penalize(logits: Tensor, rows: Tensor, ids: Tensor, times: Tensor, factors: Tensor) -> None:
    """For each (row, id): logit *= repeat (/= when positive), then -= times * frequency + presence; factors (n, 3) float32."""
    count = rows.shape[0]
    if count:
        penalty_kernel[(triton.cdiv(count, 256),)](logits, rows, ids, times, factors, count, logits.shape[1], SIZE=256)


def draw(logits: Tensor, choices: Choices) -> Tensor:
    """Tokens (n,) int32 of rows (n, V) float32 without filters: the likeliest, or one of softmax(row / temperature)."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    if tokens.numel():
        draw_kernel[(logits.shape[0],)](
            *(logits, choices.temperature, choices.seed, choices.step, tokens, logits.shape[1]), BLOCK=BLOCK, num_warps=8
        )
    return tokens


def filtered(logits: Tensor, choices: Choices, candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """Tokens (n,) int32, and whether the host must decide a row instead (n,) int8: see `filter_kernel`."""
    rows, device = logits.shape[0], logits.device
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    beyond = torch.empty(rows, dtype=torch.int8, device=device)
    if rows:
        scratch = torch.empty(rows, candidates, dtype=torch.int64, device=device)
        filter_kernel[(rows,)](
            *(logits, choices.top_k, choices.top_p, choices.min_p, choices.temperature, choices.seed, choices.step),
            *(tokens, beyond, scratch, logits.shape[1]),
            BLOCK=BLOCK,
            CANDIDATES=candidates,
            num_warps=16,
        )
    return tokens, beyond


def logprobs(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Natural log-probability of each row's token, and the rows' log-sum-exp, (n,) float32 each."""
    out = torch.empty(logits.shape[0], 2, dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        logprob_kernel[(logits.shape[0],)](logits, tokens, out, logits.shape[1], BLOCK=BLOCK, num_warps=16)
    return out[:, 0], out[:, 1]


def uniforms(choices: Choices) -> Tensor:
    """(n,) float32 in [0, 1): what `filtered` draws with."""
    out = torch.empty(choices.seed.shape[0], dtype=torch.float32, device=choices.seed.device)
    uniform_kernel[(out.shape[0],)](choices.seed, choices.step, out)
    return out
