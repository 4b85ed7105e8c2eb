"""Mixture of experts on packed weights: routing, the experts' matmuls for few or for many rows, and their weighted sum.

Few (token, choice) pairs: a matvec per pair with the expert's rows, nothing is sorted. Many: pairs are sorted by expert and
each expert's run is padded to whole tiles, so that a tile has one expert. The sizes of the runs stay on the device: the number
of tiles is the most that any routing can need, and tiles beyond the last run have no rows. Answers lie by pair, so the sum of
a token's experts has one order whatever else is in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ollamapy.reference import Activation, Routing
from ollamapy.triton_kernels import decode, tuning
from ollamapy.triton_kernels.activation import gated_activation
from ollamapy.triton_kernels.forms import GROUP
from ollamapy.triton_kernels.layout import Planes
from ollamapy.triton_kernels.linear import DOT_TYPES, matvec
from ollamapy.triton_kernels.matmul import matmul_kernel
from ollamapy.triton_kernels.tuning import Tile

GATINGS = {"softmax": 0, "sigmoid": 1, "softmax_selected": 2}
SUM_SIZE = 512


@triton.jit
def route_kernel(
    logits,
    ids,
    weights,
    experts,
    scale,
    GATING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    USED: tl.constexpr,
    PADDED: tl.constexpr,
    PADDED_USED: tl.constexpr,
):
    """One token: its USED likeliest experts, likeliest first, the lower number first among equals.

    NaN is never compared (`tl.max` passes over it, and no expert would equal that): the experts exist whatever the logits
    are. The weights of such a token are NaN.
    """
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PADDED)
    place = tl.arange(0, PADDED_USED)
    logit = tl.load(logits + token * experts + i, i < experts, other=float("-inf")).to(tl.float32)
    bad = logit != logit
    logit = tl.where(bad, 0.0, logit)
    if GATING == 0:
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    elif GATING == 1:
        score = tl.sigmoid(logit)
    else:
        score = logit
    bad |= (i < experts) & (score != score)  # infinite logits
    left = tl.where((i < experts) & (score == score), score, float("-inf"))
    chosen = tl.zeros((PADDED_USED,), tl.int32)
    value = tl.full((PADDED_USED,), float("-inf") if GATING == 2 else 0.0, tl.float32)
    for step in tl.static_range(USED):
        best = tl.max(left, 0)
        index = tl.min(tl.where(left == best, i, PADDED), 0)
        chosen = tl.where(place == step, index, chosen)
        value = tl.where(place == step, best, value)
        left = tl.where(i == index, float("-inf"), left)
    if GATING == 2:
        value = tl.exp(value - tl.max(value, 0))
        value = value / tl.sum(value, 0)
    elif RENORMALIZE:
        value = value / tl.maximum(tl.sum(value, 0), 0.00006103515625)
    if GATING != 2:
        value *= scale
    value = tl.where(tl.max(bad.to(tl.int32), 0) != 0, float("nan"), value)
    tl.store(ids + token * USED + place, chosen, place < USED)
    tl.store(weights + token * USED + place, value, place < USED)


@triton.jit
def sum_kernel(answers, weights, out, width, USED: tl.constexpr, ADD: tl.constexpr, SIZE: tl.constexpr):
    """out (n, width): a token's answers (n, USED, width), each times its weight, added in their order."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    live = at < width
    total = tl.zeros((SIZE,), tl.float32)
    for place in tl.static_range(USED):
        pair = token * USED + place
        total += tl.load(weights + pair) * tl.load(answers + pair * width + at, live, other=0.0).to(tl.float32)
    if ADD:
        total += tl.load(out + token * width + at, live, other=0.0).to(tl.float32)
    tl.store(out + token * width + at, total.to(out.dtype.element_ty), live)


class Experts(NamedTuple):
    """gate and up (X, F, E), down (X, E, F); `joined` has the rows of gate, then those of up, in the same memory."""

    gate: Planes
    up: Planes
    down: Planes
    joined: Planes | None = None


class Runs(NamedTuple):
    """Tiles of pairs (token * used + choice) of one expert each; -1: no pair."""

    pair_of: Tensor  # (tiles * rows,) int32
    expert_of: Tensor  # (tiles,) int32
    tile: Tile


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Router logits (n, X) -> experts (n, used) int32 and their weights (n, used) float32: see `ollamapy.reference.route`."""
    rows, experts = logits.shape
    ids = torch.empty(rows, routing.used, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, routing.used, dtype=torch.float32, device=logits.device)
    route_kernel[(rows,)](
        *(logits.contiguous(), ids, weights, experts, routing.scale or 1.0),
        GATING=GATINGS[routing.gating],
        RENORMALIZE=routing.renormalize,
        USED=routing.used,
        PADDED=triton.next_power_of_2(experts),
        PADDED_USED=triton.next_power_of_2(routing.used),
        num_warps=1,
    )
    return ids, weights


def sort_by_expert(ids: Tensor, experts: int, table: tuning.Table | None = None) -> Runs:
    """ids (n, used) -> runs, without a synchronization."""
    pairs = ids.flatten().long()
    tile = (table or tuning.of(ids.device)).tile(triton.cdiv(pairs.numel(), experts))
    rows = tile.rows
    tiles = min(triton.cdiv(pairs.numel(), rows) + experts, pairs.numel())  # each expert wastes less than a tile
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(0, pairs, torch.ones_like(pairs))
    ends = ((counts + rows - 1) // rows).cumsum(0)  # in tiles
    order = pairs.argsort(stable=True)
    chosen = pairs[order]
    starts = (ends - (counts + rows - 1) // rows) * rows - (counts.cumsum(0) - counts)
    place = torch.arange(pairs.numel(), device=ids.device) + starts[chosen]
    pair_of = torch.full((tiles * rows,), -1, dtype=torch.int32, device=ids.device)
    pair_of[place] = order.int()
    expert_of = torch.searchsorted(ends, torch.arange(tiles, device=ids.device), right=True).clamp_(max=experts - 1)
    return Runs(pair_of, expert_of.int(), tile)


def grouped_matmul(x: Tensor, weight: Planes, runs: Runs, used: int, out: Tensor, dot: torch.dtype) -> Tensor:
    """out[pair] = x[pair // used] W[its expert]^T; `weight` is (X, N, K)."""
    assert weight.form is not None
    columns, groups = weight.shape[-2], weight.shape[-1] // GROUP
    tile = runs.tile
    step = min(tile.groups, triton.next_power_of_2(groups))
    matmul_kernel[(runs.expert_of.shape[0], triton.cdiv(columns, tile.columns), 1)](
        x,
        **decode.pointers(weight),
        out=out,
        bias=out,
        row_of=runs.pair_of,
        expert_of=runs.expert_of,
        rows=out.shape[0],
        columns=columns,
        groups=groups,
        span=triton.cdiv(groups, step) * step,
        out_stride=out.stride(0),
        SPLIT=False,
        BIAS=False,
        ADD=False,
        USED=used,
        DOT=DOT_TYPES[dot],
        EVEN=groups % step == 0,
        **decode.constants(weight.form),
        BM=tile.rows,
        BN=tile.columns,
        GROUPS=step,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )
    return out


def _dense_experts(x: Tensor, ids: Tensor, experts: Experts, kind: Activation) -> Tensor:
    """Experts of a float type: gathered per pair. Files keep experts quantized, so this is for tests and rare types."""
    gate, up, down = (part.low.view(part.shape) for part in experts[:3])
    pairs, rows = ids.flatten().long(), x.repeat_interleave(ids.shape[1], 0).to(gate.dtype).unsqueeze(2)
    inner = gated_activation((gate[pairs] @ rows).squeeze(2), (up[pairs] @ rows).squeeze(2), kind)
    return (down[pairs] @ inner.unsqueeze(2)).squeeze(2).to(x.dtype)


def answers(x: Tensor, ids: Tensor, experts: Experts, kind: Activation, dot: torch.dtype) -> Tensor:
    """(n * used, E): each chosen expert's answer to its token."""
    gate, up, down = experts[:3]
    used, pairs = ids.shape[1], ids.numel()
    if gate.form is None or up.form is None or down.form is None:
        return _dense_experts(x, ids, experts, kind)
    inner = x.new_empty(pairs, gate.shape[1])
    out = x.new_empty(pairs, down.shape[1])
    if pairs <= tuning.of(x.device).matvec_pairs:
        flat = ids.flatten()
        if experts.joined is not None:
            matvec(x, experts.joined, inner, gate=kind, experts=(flat, used))
        else:
            right = matvec(x, up, torch.empty_like(inner), experts=(flat, used))
            inner = gated_activation(matvec(x, gate, inner, experts=(flat, used)), right, kind)
        return matvec(inner, down, out, experts=(flat, 1))
    runs = sort_by_expert(ids, gate.shape[0], tuning.of_weight(gate))
    right = grouped_matmul(x, up, runs, used, torch.empty_like(inner), dot)
    inner = gated_activation(grouped_matmul(x, gate, runs, used, inner, dot), right, kind)
    return grouped_matmul(inner, down, runs, 1, out, dot)


def mix(x: Tensor, logits: Tensor, experts: Experts, routing: Routing, kind: Activation, out: Tensor, add: bool) -> Tensor:
    """Routed experts of x (n, E) into `out` (n, E), or onto it with `add`."""
    ids, weights = route(logits, routing)
    found = answers(x, ids, experts, kind, tuning.activations(x.device, experts.gate.precise))
    size = min(SUM_SIZE, triton.next_power_of_2(out.shape[1]))
    sum_kernel[(out.shape[0], triton.cdiv(out.shape[1], size))](
        *(found, weights, out, out.shape[1]), USED=routing.used, ADD=add, SIZE=size
    )
    return out


def moe(x: Tensor, logits: Tensor, experts: tuple[Planes, Planes, Planes], routing: Routing, kind: Activation) -> Tensor:
    """Routed gated experts, (n, E) -> (n, E): see `ollamapy.reference.moe`."""
    x = x.contiguous()
    return mix(x, logits, Experts(*experts), routing, kind, torch.empty_like(x), False) if x.shape[0] else x
