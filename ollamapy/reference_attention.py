"""Attention over the paged KV cache in plain torch: the reference of `ops.attention`, and the plan of one batch.

Rows are computed in whatever groups are cheap: all decoding sequences together, a prefill in pieces that fit a memory
bound. It makes no difference to any bit of a row: keys are taken in tiles of KEY_TILE absolute positions whose partial sums
are added in order, tiles that a row does not see add exact zeros, and matrix products have a multiple of 4 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ollamapy.engine.batch import Batch, KVCache
from ollamapy.reference import ROW_TILE, softcap

KEY_TILE = 128
MAX_TILE_BYTES = 64 << 20  # of scores, and of gathered keys and values, at a time


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention of one layer looks like to the plan; layers with equal Heads share its index tensors."""

    num_heads: int
    num_kv_heads: int
    head_length: int  # key_length + value_length
    window: int
    causal: bool


@dataclass(frozen=True, slots=True)
class _Rows:
    """`length` consecutive rows of each of `sequences`, the first of them at batch row `rows[i]` and position `first[i]`."""

    sequences: list[int]
    rows: list[int]
    first: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are computed together, with the cache blocks they read."""

    rows: Tensor  # (S * L,) int64 batch rows
    blocks: Tensor  # (S * tiles * KEY_TILE / block_size,) int64
    hidden: Tensor  # (tiles, S, 1, R, KEY_TILE) bool: keys that a row does not see; R = L * heads per kv head, padded
    stale: Tensor  # (tiles, S, 1, KEY_TILE, 1) bool: slots of no token of the sequence; they may hold anything, NaN included
    num_sequences: int
    length: int
    tiles: int


class AttentionPlan:
    """One batch's attention: made once per forward pass, its index tensors once for all layers that agree in `Heads`."""

    def __init__(self, batch: Batch, block_size: int) -> None:
        assert KEY_TILE % block_size == 0, f"block_size {block_size} does not divide {KEY_TILE}"
        self.batch, self.block_size = batch, block_size
        self._starts = [0]
        for length in batch.query_lens:
            self._starts.append(self._starts[-1] + length)
        self._groups: dict[Heads, list[_Group]] = {}

    def groups(self, heads: Heads) -> list[_Group]:
        found = self._groups.get(heads)
        if found is None:
            found = self._groups[heads] = [self._group(rows, heads) for rows in self._split(heads)]
        return found

    def _split(self, heads: Heads) -> Iterator[_Rows]:
        """Prefills piece by piece, each sequence alone; then decoding sequences of like length together."""
        batch = self.batch
        decoding = []
        for s, length in enumerate(batch.query_lens):
            first = batch.context_lens[s] - length
            if length == 1:
                decoding.append(s)
                continue
            keys = min(batch.context_lens[s], heads.window + length) if heads.window else batch.context_lens[s]
            step = max(MAX_TILE_BYTES // (4 * heads.num_heads * keys), 16)
            step = min(step, KEY_TILE) if heads.causal else step  # early pieces of a causal prefill see fewer keys
            for start in range(0, length, step):
                yield _Rows([s], [self._starts[s] + start], [first + start], min(step, length - start))
        decoding.sort(key=lambda s: batch.context_lens[s])
        while decoding:
            longest = batch.context_lens[decoding[-1]]
            keys = min(longest, heads.window) if heads.window else longest
            most = max(MAX_TILE_BYTES // (4 * heads.num_kv_heads * heads.head_length * (keys + KEY_TILE)), 1)
            taken = [s for s in decoding[-most:] if 2 * batch.context_lens[s] + KEY_TILE >= longest]
            del decoding[-len(taken) :]
            yield _Rows(taken, [self._starts[s] for s in taken], [batch.context_lens[s] - 1 for s in taken], 1)

    def _group(self, rows: _Rows, heads: Heads) -> _Group:
        batch, device, block_size = self.batch, self.batch.block_table.device, self.block_size
        contexts = [batch.context_lens[s] for s in rows.sequences]
        reach = heads.window if heads.causal else heads.window // 2 + 1
        low = [max(first - reach + 1, 0) // KEY_TILE if heads.window else 0 for first in rows.first]
        last = [first + rows.length if heads.causal else context for first, context in zip(rows.first, contexts, strict=True)]
        tiles = max(-(-end // KEY_TILE) - start for start, end in zip(low, last, strict=True))
        count, per_tile = len(rows.sequences), KEY_TILE // block_size
        origin, seen, first, start = torch.tensor([low, contexts, rows.first, rows.rows], device=device).unsqueeze(-1).unbind(0)

        index = origin * per_tile + torch.arange(tiles * per_tile, device=device)  # (S, blocks)
        index.clamp_(max=batch.block_table.shape[1] - 1)
        table = batch.block_table[torch.tensor(rows.sequences, device=device)]
        key = origin * KEY_TILE + torch.arange(tiles * KEY_TILE, device=device)  # (S, keys) absolute positions
        stale = key >= seen
        each = torch.arange(rows.length, device=device)
        group = heads.num_heads // heads.num_kv_heads
        query = (first + each).repeat_interleave(group, dim=1)  # (S, R) absolute positions
        query = torch.cat((query, query[:, -1:].expand(-1, -query.shape[1] % ROW_TILE)), 1)
        distance = query.unsqueeze(-1) - key.unsqueeze(1)  # (S, R, keys)
        hidden = stale.unsqueeze(1) | (distance < 0) if heads.causal else stale.unsqueeze(1).expand_as(distance)
        if heads.window:
            hidden = hidden | ((distance if heads.causal else distance.abs()) >= reach)
        return _Group(
            rows=(start + each).flatten(),
            blocks=table.gather(1, index).flatten().long(),
            hidden=hidden.view(count, -1, tiles, KEY_TILE).permute(2, 0, 1, 3).unsqueeze(2).contiguous(),
            stale=stale.view(count, tiles, KEY_TILE).transpose(0, 1)[:, :, None, :, None].contiguous(),
            num_sequences=count,
            length=rows.length,
            tiles=tiles,
        )


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
    """softmax(q k^T scale) v for each row over its own sequence -> (n, H * Dv); rows beyond the batch's are zero.

    q is (n, H, D). `window` > 0: a key is seen when fewer than `window` positions back (within window // 2 on both sides when
    not causal). `cap` > 0: scores become cap * tanh(score / cap). `sinks` (H) are extra logits that only enter the
    denominator. H is a multiple of the cache's heads; heads h * H / Hkv and the following share key-value head h.
    """
    num_kv_heads, value_length = cache.value.shape[2:]
    heads = Heads(q.shape[1], num_kv_heads, q.shape[2] + value_length, window, causal)
    out = q.new_zeros(q.shape[0], q.shape[1] * value_length)
    for group in plan.groups(heads):
        queries = _queries(q, group, num_kv_heads, scale)
        scores = _scores(queries, _gather(cache.key, group), group, cap)
        total = _softmax(scores, _sink_rows(sinks, group, scores) if sinks is not None else None)
        answer = _weighted_sum(scores, total, _gather(cache.value, group, clean=True))
        used = group.length * q.shape[1] // num_kv_heads
        answer = answer[:, :, :used].reshape(group.num_sequences, num_kv_heads, group.length, -1)  # (S, Hkv, L, G * Dv)
        out[group.rows] = answer.transpose(1, 2).reshape(-1, out.shape[1])
    return out


def _queries(q: Tensor, group: _Group, num_kv_heads: int, scale: float) -> Tensor:
    """(S, Hkv, R, D) scaled; the rows of a key-value head are its query heads at each position, padded with zeros."""
    rows = q[group.rows].view(group.num_sequences, group.length, num_kv_heads, -1, q.shape[2]).transpose(1, 2).flatten(2, 3)
    queries = q.new_zeros(*rows.shape[:2], group.hidden.shape[3], rows.shape[3])
    torch.mul(rows, scale, out=queries[:, :, : rows.shape[2]])
    return queries


def _gather(store: Tensor, group: _Group, clean: bool = False) -> Tensor:
    """(tiles, S, Hkv, KEY_TILE, D) float32 of the group's blocks. `clean`: slots of no token become 0."""
    blocks = store.index_select(0, group.blocks).view(group.num_sequences, group.tiles, KEY_TILE, *store.shape[2:])
    blocks = blocks.permute(1, 0, 3, 2, 4)
    tiles = torch.empty(blocks.shape, dtype=torch.float32, device=store.device).copy_(blocks)
    return tiles.masked_fill_(group.stale, 0.0) if clean else tiles


def _scores(queries: Tensor, keys: Tensor, group: _Group, cap: float) -> Tensor:
    """(tiles, S, Hkv, R, KEY_TILE); -inf where a row does not see a key."""
    tiles, count, heads = keys.shape[:3]
    scores = torch.empty(tiles, count, heads, queries.shape[2], KEY_TILE, dtype=torch.float32, device=keys.device)
    for tile in range(tiles):
        torch.bmm(queries.flatten(0, 1), keys[tile].flatten(0, 1).transpose(1, 2), out=scores[tile].flatten(0, 1))
    if cap:
        softcap(scores, cap)
    return scores.masked_fill_(group.hidden, -torch.inf)


def _sink_rows(sinks: Tensor, group: _Group, scores: Tensor) -> Tensor:
    """Sinks (H) as (1, 1, Hkv, R, 1), in the order of the rows."""
    _, _, heads, num_rows, _ = scores.shape
    rows = sinks.view(heads, 1, -1).expand(-1, group.length, -1).flatten(1)
    return torch.nn.functional.pad(rows, (0, num_rows - rows.shape[1])).view(1, 1, heads, num_rows, 1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """exp(scores - maximum) in place; returns their sums (S, Hkv, R, 1), the tiles' added in order."""
    peak = scores.amax(dim=(0, 4), keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    sums = scores.sub_(peak).exp_().sum(-1, keepdim=True)
    total = sums[0]
    for tile in range(1, sums.shape[0]):
        total += sums[tile]
    return total if sinks is None else total.add_((sinks - peak).exp_()[0])


def _weighted_sum(weights: Tensor, total: Tensor, values: Tensor) -> Tensor:
    """(S, Hkv, R, Dv): weights (tiles, S, Hkv, R, KEY_TILE) times values, over `total`; the tiles' parts added in order."""
    answer = torch.bmm(weights[0].flatten(0, 1), values[0].flatten(0, 1))
    for tile in range(1, weights.shape[0]):
        answer += torch.bmm(weights[tile].flatten(0, 1), values[tile].flatten(0, 1))
    return answer.view(total.shape[0], total.shape[1], total.shape[2], -1).div_(total)
