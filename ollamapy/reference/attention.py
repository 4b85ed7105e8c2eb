"""Attention over the paged KV cache in plain torch: the reference of `ops.attention`, and the plan of one batch.

Rows are computed in whatever groups are cheap: all decoding sequences together, a prefill in pieces that fit a memory
bound. It makes no difference to any bit of a row: keys are taken in tiles of KEY_TILE absolute positions whose partial sums
are added in order, tiles that a row does not see add exact zeros, and matrix products have a multiple of 4 rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ollamapy.engine.batch import Batch, KVCache
from ollamapy.gguf.types import GGMLType
from ollamapy.quant.dequant import dequantize
from ollamapy.reference import ROW_TILE, softcap

KEY_TILE = 128
MAX_TILE_BYTES = 64 << 20  # of scores, and of gathered keys and values, at a time


class Heads(NamedTuple):
    """What attention of one layer looks like to the plan; layers with equal Heads share its index tensors."""

    num_heads: int
    num_kv_heads: int
    head_length: int  # key_length + value_length
    window: int
    causal: bool

    @property
    def reach(self) -> int:
        """A window's first hidden distance."""
        return self.window if self.causal else self.window // 2 + 1


@dataclass(frozen=True, slots=True)
class _Rows:
    """`length` consecutive rows of each of `sequences`, the first of them at batch row `rows[i]` and position `first[i]`."""

    sequences: list[int]
    rows: list[int]
    first: list[int]
    length: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are computed together, with the cache slots they read."""

    rows: Tensor | None  # (S * L,) int64 batch rows; None: those from `start` on
    start: int
    num_sequences: int
    length: int
    tiles: int
    slots: Tensor  # (tiles * S * Hkv * KEY_TILE,) int64: rows of the cache seen as (num_blocks * block_size * Hkv, D)
    bias: (
        Tensor  # (tiles, S, 1, R, KEY_TILE): 0, or -inf for a key the row does not see; R = L * query heads per kv head, padded
    )


class AttentionPlan:
    """One batch's attention: made once per forward pass, its index tensors once for all layers that agree in `Heads`."""

    def __init__(self, batch: Batch, block_size: int) -> None:
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
        low = [max(first - heads.reach + 1, 0) // KEY_TILE if heads.window else 0 for first in rows.first]
        last = [first + rows.length if heads.causal else context for first, context in zip(rows.first, contexts, strict=True)]
        tiles = max(-(-end // KEY_TILE) - start for start, end in zip(low, last, strict=True))
        count = len(rows.sequences)
        tables = batch.block_table[torch.tensor(rows.sequences, device=device)].long()
        origin, seen, first = torch.tensor([low, contexts, rows.first], device=device).unsqueeze(-1).unbind(0)
        key = origin * KEY_TILE + torch.arange(tiles * KEY_TILE, device=device)  # (S, keys) absolute positions
        # Positions beyond the sequence read its newest slot: their weight is 0, but a slot of nobody may hold NaN.
        held = key.minimum(seen - 1)
        slots = tables.gather(1, held // block_size) * block_size + held % block_size
        slots = slots.view(count, tiles, 1, KEY_TILE).transpose(0, 1) * heads.num_kv_heads
        slots = slots + torch.arange(heads.num_kv_heads, device=device).view(-1, 1)  # (tiles, S, Hkv, KEY_TILE)
        group = heads.num_heads // heads.num_kv_heads
        query = (first + torch.arange(rows.length, device=device)).repeat_interleave(group, dim=1)  # (S, R) positions
        query = torch.cat((query, query[:, -1:].expand(-1, -query.shape[1] % ROW_TILE)), 1)
        bias = self._bias(query.unsqueeze(-1), key.unsqueeze(1), seen.unsqueeze(1), heads)
        start = torch.tensor(rows.rows, device=device).unsqueeze(-1)
        return _Group(
            rows=(start + torch.arange(rows.length, device=device)).flatten() if count > 1 else None,
            start=rows.rows[0],
            num_sequences=count,
            length=rows.length,
            tiles=tiles,
            slots=slots.flatten(),
            bias=bias.view(count, -1, tiles, KEY_TILE).permute(2, 0, 1, 3).unsqueeze(2).contiguous(),
        )

    @staticmethod
    def _bias(query: Tensor, key: Tensor, seen: Tensor, heads: Heads) -> Tensor:
        """(S, R, keys): -inf where a key is not the sequence's, lies ahead, or is out of the window."""
        hidden = key > query if heads.causal else (key >= seen).expand(-1, query.shape[1], -1)
        if heads.window:
            hidden = hidden | ((query - key if heads.causal else (query - key).abs()) >= heads.reach)
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)


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
    num_kv_heads, value_length = cache.value.shape[2], _length(cache.value)
    num_rows, num_heads, key_length = q.shape
    width = num_heads // num_kv_heads * value_length
    out = q.new_zeros(num_rows, num_kv_heads, width)
    for group in plan.groups(Heads(num_heads, num_kv_heads, key_length + value_length, window, causal)):
        queries = _queries(q, group, num_kv_heads, scale)
        scores = torch.matmul(queries, _gather(cache.key, group).transpose(-1, -2))  # (tiles, S, Hkv, R, KEY_TILE)
        if cap:
            softcap(scores, cap)
        total = _softmax(scores.add_(group.bias), _sink_rows(sinks, group, scores) if sinks is not None else None)
        answer = _add_tiles(torch.matmul(scores, _gather(cache.value, group))).div_(total)  # (S, Hkv, R, Dv)
        used = answer.narrow(2, 0, group.length * num_heads // num_kv_heads)
        used = used.view(group.num_sequences, num_kv_heads, group.length, width).transpose(1, 2)
        if group.rows is None:
            out.narrow(0, group.start, group.length).copy_(used[0])
        else:
            out.index_copy_(0, group.rows, used.flatten(0, 1))
    return out.view(num_rows, -1)


def _queries(q: Tensor, group: _Group, num_kv_heads: int, scale: float) -> Tensor:
    """(S, Hkv, R, D) scaled; the rows of a key-value head are its query heads at each position, padded with zeros."""
    rows = q[group.start : group.start + group.length] if group.rows is None else q.index_select(0, group.rows)
    rows = rows.view(group.num_sequences, group.length, num_kv_heads, -1, q.shape[2]).transpose(1, 2).flatten(2, 3)
    queries = q.new_zeros(group.num_sequences, num_kv_heads, group.bias.shape[3], q.shape[2])
    torch.mul(rows, scale, out=queries[:, :, : rows.shape[2]])
    return queries


def _gather(store: Tensor, group: _Group) -> Tensor:
    """(tiles, S, Hkv, KEY_TILE, D) float32 of a cache (num_blocks, block_size, Hkv, D), or of Q8_0 blocks of D."""
    plain = store.view(torch.uint8) if store.dtype is torch.float8_e4m3fn else store  # torch indexes no fp8
    rows = plain.view(-1, store.shape[3]).index_select(0, group.slots)
    shape = (group.tiles, group.num_sequences, store.shape[2], KEY_TILE, _length(store))
    return dequantize(rows, GGMLType.Q8_0, shape) if store.dtype is torch.uint8 else rows.view(store.dtype).float().view(shape)


def _length(store: Tensor) -> int:
    """Elements of a head."""
    return store.shape[3] // 34 * 32 if store.dtype is torch.uint8 else store.shape[3]


def _sink_rows(sinks: Tensor, group: _Group, scores: Tensor) -> Tensor:
    """Sinks (H) as (1, 1, Hkv, R, 1), in the order of the rows."""
    _, _, heads, num_rows, _ = scores.shape
    rows = sinks.view(heads, 1, -1).expand(-1, group.length, -1).flatten(1)
    return torch.nn.functional.pad(rows, (0, num_rows - rows.shape[1])).view(1, 1, heads, num_rows, 1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """exp(scores - maximum) in place; returns their sums (S, Hkv, R, 1)."""
    peak = scores.amax(dim=(0, 4), keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    total = _add_tiles(scores.sub_(peak).exp_().sum(-1, keepdim=True))
    return total if sinks is None else total.add_((sinks - peak).exp_()[0])


def _add_tiles(parts: Tensor) -> Tensor:
    """The sum over the first dimension, one after the other: tiles of zeros at either end change no bit."""
    total = parts[0]
    for tile in range(1, parts.shape[0]):
        total += parts[tile]
    return total


def plan(batch: Batch, cache: KVCache) -> AttentionPlan:
    """The plan of a batch over caches of one block size."""
    return AttentionPlan(batch, cache.key.shape[1])
