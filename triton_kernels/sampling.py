"""Sampling on the device: the host sampler's token of each row, without a sort of the vocabulary. A launch each for the draw
and for what logprobs are made of.

A row is one program's, so its token depends on its logits, parameters and uniform number alone. Tokens are ranked by keys of 64
bits, the logit's order above and the token id below (the lower first among equals). The k likeliest are found by a radix search
on the bits of the logits (four passes of 256 bins), and only they are sorted. A row whose filters reach further is decided by a
search for the key below which too little mass is left. Filters are `engine.filters`' in their order: top-k, top-p, min-p, then
temperature; masses are float64, as on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.engine.filters import Floats
from ollamapy.engine.protocol import SamplingParams
from ollamapy.reference import device_sampling
from ollamapy.triton_kernels import tuning

BLOCK = 4096  # logits at a time when the likeliest are told; for draws see `tuning`
FEW, CANDIDATES = 64, 1024  # tokens that are sorted: with a top_k up to FEW, and otherwise
MOST_IDS = 1 << 20  # tokens of a vocabulary: a key is 32 bits of order and 20 bits of 1048575 - id


@triton.jit
def _keys(logits, row, base, size, BLOCK: tl.constexpr):
    """Logits (BLOCK,), NaN as infinity, and their keys; -1 beyond the vocabulary."""
    i = base + tl.arange(0, BLOCK)
    x = tl.load(logits + row * size + i, i < size, other=float("-inf"))
    x = tl.where(x == x, x, float("inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return x, tl.where(i < size, (order << 20) + (1048575 - i).to(tl.int64), -1)


@triton.jit
def _logit(key):
    """Of a key that is not negative."""
    order = ((key >> 20) - 2147483648).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _id(key):
    return 1048575 - (key & 1048575).to(tl.int32)


@triton.jit
def _largest(logits, row, size, count, held, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr):
    """Keys (CANDIDATES,) of the `count` <= CANDIDATES likeliest tokens of a row, in their order, and -1 behind them.

    `held`: memory for CANDIDATES keys of this program's own.
    """
    bins = tl.arange(0, 256)
    prefix = tl.zeros((), tl.int64)
    needed = count
    for digit in tl.static_range(4):
        found = tl.zeros((256,), tl.int32)
        for base in range(0, size, BLOCK):
            _, key = _keys(logits, row, base, size, BLOCK)
            order = key >> 20
            among = (key >= 0) & ((order >> (32 - 8 * digit)) == prefix)
            found += tl.histogram(((order >> (24 - 8 * digit)) & 255).to(tl.int32), 256, mask=among)
        reached = tl.cumsum(found, 0, reverse=True)  # how many are in a bin or a higher one
        bin = tl.max(tl.where(reached >= needed, bins, 0), 0)
        needed -= tl.sum(tl.where(bins > bin, found, 0), 0)
        prefix = prefix * 256 + bin
    place = 0
    ties = 0
    for base in range(0, size, BLOCK):
        _, key = _keys(logits, row, base, size, BLOCK)
        order = key >> 20
        same = ((order == prefix) & (key >= 0)).to(tl.int32)
        taken = ((order > prefix) & (key >= 0)) | ((same > 0) & (ties + tl.cumsum(same, 0) <= needed))
        tl.store(held + place + tl.cumsum(taken.to(tl.int32), 0) - 1, key, taken)
        place += tl.sum(taken.to(tl.int32), 0)
        ties += tl.sum(same, 0)
    tl.debug_barrier()
    slot = tl.arange(0, CANDIDATES)
    return tl.sort(tl.load(held + slot, slot < count, other=-1), descending=True)


@triton.jit
def _mass(logits, row, size, best, heat, least, low, BLOCK: tl.constexpr):
    """Sum of exp((x - best) / heat) over the tokens whose key is at least `least` and whose exp(x - best) is at least `low`."""
    total = tl.zeros((), tl.float64)
    for base in range(0, size, BLOCK):
        x, key = _keys(logits, row, base, size, BLOCK)
        below = tl.where(x == float("-inf"), 0.0, x).to(tl.float64) - best
        counts = (key >= least) & (x > float("-inf")) & (tl.exp(below) >= low)
        total += tl.sum(tl.where(counts, tl.exp(below / heat), 0.0), 0)
    return total


@triton.jit
def _searched(logits, row, size, first, best, temperature, top_k, top_p, low, uniform, BLOCK: tl.constexpr):
    """A token of a row whose filters keep more than the candidates: three searches, each of 52 passes, for the largest key at
    and above which the mass is enough: of top_k tokens, of top_p, and of the token drawn."""
    least = tl.zeros((), tl.int64)
    for stage in range(3):
        heat = tl.where(stage == 0, float("inf"), tl.where(stage == 1, 1.0, temperature))  # by infinity all weigh 1
        low_here = tl.where(stage == 2, low, 0.0)
        if ((stage == 0) & (top_k > 0)) | ((stage == 1) & (top_p < 1.0)) | (stage == 2):
            whole = _mass(logits, row, size, best, heat, least, low_here, BLOCK)
            target = tl.where(stage == 0, top_k.to(tl.float64), top_p * whole)
            if stage == 2:  # the product may round up to the whole
                target = tl.minimum(uniform * whole, whole - whole * 2.220446049250313e-16)
            edge = tl.zeros((), tl.int64)
            bit = tl.full((), 1 << 51, tl.int64)
            for _ in range(52):
                mass = _mass(logits, row, size, best, heat, edge + bit, low_here, BLOCK)
                edge = tl.where((mass > target) | ((mass == target) & (stage < 2)), edge + bit, edge)
                bit = bit >> 1
            least = tl.where(stage == 2, edge, tl.minimum(tl.maximum(least, edge), first))
    return _id(least)


@triton.jit
def _in_order(logits, row, size, best, temperature, uniform, BLOCK: tl.constexpr):
    """A token of a row without filters: the vocabulary in the order of ids."""
    none = tl.zeros((), tl.float64)
    target = uniform * _mass(logits, row, size, best, temperature, tl.zeros((), tl.int64), none, BLOCK)
    before = none
    passed = 0
    last = 0
    for base in range(0, size, BLOCK):
        x, key = _keys(logits, row, base, size, BLOCK)
        below = tl.where(x == float("-inf"), 0.0, x).to(tl.float64) - best
        share = tl.where((key >= 0) & (x > float("-inf")), tl.exp(below / temperature), 0.0)
        running = before + tl.cumsum(share, 0)
        passed += tl.sum(((key >= 0) & (running <= target)).to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(share > 0.0, base + tl.arange(0, BLOCK), 0), 0))
        before += tl.sum(share, 0)
    return tl.minimum(passed, last)


@triton.jit
def _filtered(
    logits, row, size, best, temperature, top_k, top_p, min_p, uniform, held, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr
):
    """A token of a row with filters, and whether they keep more than the candidates: then it is another. min_p <= 1."""
    limited = (top_k > 0) & (top_k <= CANDIDATES)
    count = tl.minimum(tl.where(limited, top_k, CANDIDATES), size)
    key = _largest(logits, row, size, count, held, BLOCK, CANDIDATES)
    slot = tl.arange(0, CANDIDATES)
    kept = slot < count
    value = tl.where(kept, _logit(key), float("-inf"))
    below = tl.where(value == float("-inf"), 0.0, value).to(tl.float64) - best
    weight = tl.where(kept & (value > float("-inf")), tl.exp(below), 0.0)
    whole = tl.sum(weight, 0)
    if (top_k <= 0) & (top_p < 1.0):
        whole = _mass(logits, row, size, best, whole * 0.0 + 1.0, tl.zeros((), tl.int64), whole * 0.0, BLOCK // 4)
    reach = tl.where(top_p >= 1.0, float("inf"), top_p * whole)
    kept &= (tl.cumsum(weight, 0) - weight < reach) | (slot == 0)
    kept &= weight >= min_p
    more = tl.sum((kept & (slot == count - 1)).to(tl.int32), 0) > 0
    share = tl.where(kept & (weight > 0.0), tl.exp(below / temperature), 0.0)
    running = tl.cumsum(share, 0)
    passed = tl.sum((running <= uniform * tl.sum(share, 0)).to(tl.int32), 0)
    last = tl.max(tl.where(share > 0.0, slot, 0), 0)
    token = tl.sum(tl.where(slot == tl.minimum(passed, last), _id(key), 0), 0)
    return token, (more & (count < size) & (top_k <= 0)) | (top_k > CANDIDATES)


@triton.jit
def draw_kernel(logits, cuts, held, tokens, size, BLOCK: tl.constexpr, FEW: tl.constexpr, CANDIDATES: tl.constexpr):
    """A token of each row; -1 where the largest logit is not finite. In float64 a quarter of BLOCK logits are weighed together.

    cuts (n, 5) float64: temperature, top_k, top_p, min_p, uniform. held (n, CANDIDATES) int64: room to work in.
    """
    row = tl.program_id(0).to(tl.int64)
    first = tl.full((), -1, tl.int64)
    for base in range(0, size, BLOCK):
        _, key = _keys(logits, row, base, size, BLOCK)
        first = tl.maximum(first, tl.max(key, 0))
    top = _logit(first)
    token = _id(first)
    best = top.to(tl.float64)
    cuts += row * 5
    temperature = tl.load(cuts)
    top_k = tl.load(cuts + 1).to(tl.int32)
    top_k = tl.where(top_k < size, top_k, 0)
    top_p = tl.load(cuts + 2)
    min_p = tl.minimum(tl.load(cuts + 3), 1.0)
    uniform = tl.load(cuts + 4)
    held += row * CANDIDATES
    finite = (top > float("-inf")) & (top < float("inf"))
    if finite & (temperature > 0.0):
        if (top_k <= 0) & (top_p >= 1.0) & (min_p <= 0.0):
            token = _in_order(logits, row, size, best, temperature, uniform, BLOCK // 4)
        elif (top_k > 0) & (top_k <= FEW):
            token, _ = _filtered(logits, row, size, best, temperature, top_k, top_p, min_p, uniform, held, BLOCK, FEW)
        else:
            token, more = _filtered(logits, row, size, best, temperature, top_k, top_p, min_p, uniform, held, BLOCK, CANDIDATES)
            if more:
                token = _searched(logits, row, size, first, best, temperature, top_k, top_p, min_p, uniform, BLOCK // 4)
    tl.store(tokens + row, tl.where(finite, token, -1).to(tl.int64))


@triton.jit(do_not_specialize=("count",))
def tell_kernel(logits, rows, tokens, held, told, size, count, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr):
    """Of each row of logits (m, size), whose token is `tokens[rows[m]]`: its part of told (m, 2 + 2 count) float64."""
    row = tl.program_id(0).to(tl.int64)
    key = _largest(logits, row, size, count, held + row * CANDIDATES, BLOCK, CANDIDATES)
    slot = tl.arange(0, CANDIDATES)
    value = _logit(key)
    best = tl.max(tl.where(slot == 0, value, float("-inf")), 0)
    finite = (best > float("-inf")) & (best < float("inf"))
    shift = tl.where(finite, best, 0.0)
    total = tl.zeros((), tl.float64)
    for base in range(0, size, BLOCK):
        x, _ = _keys(logits, row, base, size, BLOCK)
        total += tl.sum(tl.exp(tl.where(finite, x, 0.0) - shift), 0).to(tl.float64)
    total = tl.where(finite, tl.log(total) + shift.to(tl.float64), float("nan"))
    token = tl.maximum(tl.load(tokens + tl.load(rows + row)), 0)
    told += row * (2 + 2 * count)
    tl.store(told, tl.load(logits + row * size + token).to(tl.float64))
    tl.store(told + 1, total)
    tl.store(told + 2 + slot, value.to(tl.float64), slot < count)
    tl.store(told + 2 + count + slot, _id(key).to(tl.float64), slot < count)


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Floats) -> Tensor:
    """Ids (n,) int64 of rows (n, V) float32, see `ollamapy.reference.device_sampling.draw`: one copy and one launch."""
    rows, size = logits.shape
    assert size <= MOST_IDS, size
    block = tuning.of(logits.device).draw_logits
    cuts = device_sampling.cuts_of(params, uniforms, logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    held = torch.empty(rows, CANDIDATES, dtype=torch.int64, device=logits.device)
    draw_kernel[(rows,)](
        logits.contiguous(), cuts, held, tokens, size, BLOCK=block, FEW=FEW, CANDIDATES=CANDIDATES, num_warps=16
    )
    return tokens


def told(logits: Tensor, rows: Tensor, tokens: Tensor, count: int) -> Tensor:
    """What logprobs are made of: see `ollamapy.reference.device_sampling.told`. One launch."""
    asked, size = logits.shape
    assert size <= MOST_IDS, size
    if count > CANDIDATES:
        return device_sampling.told(logits, rows, tokens, count)
    width = FEW if count <= FEW else CANDIDATES
    held = torch.empty(asked, width, dtype=torch.int64, device=logits.device)
    found = torch.empty(asked, 2 + 2 * count, dtype=torch.float64, device=logits.device)
    args = (logits.contiguous(), rows, tokens, held, found, size, count)
    tell_kernel[(asked,)](*args, BLOCK=BLOCK, CANDIDATES=width, num_warps=16)
    return found
