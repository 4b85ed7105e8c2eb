"""Mixture of experts: one grouped matmul for all experts of a projection, on packed weights. Routing is the reference's.

Rows are sorted by expert and each expert's run is padded to whole tiles, so that a tile has one expert. The sizes of the runs
stay on the device: the number of tiles is the most that any routing can need, and tiles beyond the last run have no rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ollamapy.reference import Activation, Routing, route
from ollamapy.triton_kernels import decode
from ollamapy.triton_kernels.activation import gated_activation
from ollamapy.triton_kernels.layout import GROUP, Planes
from ollamapy.triton_kernels.matmul import DOT_TYPES, Tile, matmul_kernel, tile_for


class Runs(NamedTuple):
    """Places of tiles of `tile.rows`: which (token, choice) each holds, as token * used + choice, or -1; and tiles' experts."""

    pair_of: Tensor  # (tiles * rows,) int32
    expert_of: Tensor  # (tiles,) int32
    tile: Tile


def sort_by_expert(ids: Tensor, experts: int) -> Runs:
    """ids (n, used) int64 -> runs, without a synchronization."""
    pairs = ids.flatten()
    tile = tile_for(triton.cdiv(pairs.numel(), experts))
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


def grouped_matmul(x: Tensor, weight: Planes, runs: Runs, row_of: Tensor, dot: torch.dtype) -> Tensor:
    """x[row_of] W[expert]^T: (places, N) in x's type; rows of places without a pair are zero. `weight` is (X, N, K)."""
    assert weight.form is not None
    columns, groups = weight.shape[-2], weight.shape[-1] // GROUP
    tile, places = runs.tile, row_of.shape[0]
    step = min(tile.groups, triton.next_power_of_2(groups))
    out = torch.empty(places, columns, dtype=x.dtype, device=x.device)
    matmul_kernel[(places // tile.rows, triton.cdiv(columns, tile.columns), 1)](
        x,
        **decode.pointers(weight),
        out=out,
        row_of=row_of,
        expert_of=runs.expert_of,
        rows=places,
        columns=columns,
        groups=groups,
        span=triton.cdiv(groups, step) * step,
        ROUTED=True,
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


def moe(x: Tensor, logits: Tensor, experts: tuple[Planes, Planes, Planes], routing: Routing, kind: Activation) -> Tensor:
    """Routed gated experts, (n, E) -> (n, E): see `ollamapy.reference.moe`."""
    return routed_experts(x, logits, experts, routing, kind, torch.bfloat16)


def routed_experts(
    x: Tensor, logits: Tensor, experts: tuple[Planes, Planes, Planes], routing: Routing, kind: Activation, dot: torch.dtype
) -> Tensor:
    """`moe` in another type of products."""
    if not x.shape[0]:
        return x
    gate, up, down = experts
    ids, weights = route(logits, routing)
    x = x.contiguous()
    runs = sort_by_expert(ids, gate.shape[0])
    token_of = torch.where(runs.pair_of < 0, -1, runs.pair_of // routing.used)
    inner = gated_activation(grouped_matmul(x, gate, runs, token_of, dot), grouped_matmul(x, up, runs, token_of, dot), kind)
    held = torch.where(runs.pair_of < 0, -1, torch.arange(runs.pair_of.shape[0], device=x.device, dtype=torch.int32))
    answers = grouped_matmul(inner, down, runs, held, dot)
    parts = x.new_empty(ids.numel() + 1, x.shape[-1])  # each expert's answer in its own place: the sum has one order
    parts[torch.where(runs.pair_of < 0, ids.numel(), runs.pair_of).long()] = answers  # the last place takes what is nobody's
    parts = parts[:-1].view(*ids.shape, -1) * weights.unsqueeze(-1).to(x.dtype)
    total = parts[:, 0].clone()
    for place in range(1, routing.used):
        total += parts[:, place]
    return total
