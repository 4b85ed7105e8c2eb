"""Which tiles a batch's attention has: queries of one sequence, and how its keys are split. Knows lengths, and no kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ollamapy.engine.batch import Batch, KVCache
from ollamapy.engine.transfer import sent
from ollamapy.triton_kernels import tuning

TILE_ROWS = 64  # of queries times heads, in prefill; half as many in float32, which no tensor core multiplies exactly


class Launch(NamedTuple):
    """Tiles of equal kind: which sequence and which of its queries each begins with, and the first of its parts where keys are
    split, (tiles,) int32."""

    sequence: Tensor
    first: Tensor
    part: Tensor
    tokens: int
    rows: int
    splits: int  # of the longest context; 0: one program has all keys
    parts: int  # of all tiles


@dataclass(slots=True)
class AttentionPlan:
    """One batch's tiles: made once per forward pass, once for each number of query heads to a key-value head."""

    batch: Batch
    tile_rows: int
    split_keys: int
    split_queries: bool  # whether several queries, too, have their keys split
    launches: dict[int, list[Launch]] = field(default_factory=dict)

    def for_group(self, group: int) -> list[Launch]:
        found = self.launches.get(group)
        if found is None:
            found = self.launches[group] = self._make(group)
        return found

    def _make(self, group: int) -> list[Launch]:
        """Which launch a sequence is in, and how its keys are split, is decided by its own lengths."""
        rows = max(self.tile_rows, triton.next_power_of_2(group))
        tokens = rows // group
        lens, contexts = self.batch.query_lens, self.batch.context_lens
        decoding = [s for s, n in enumerate(lens) if n == 1]
        several = [s for s, n in enumerate(lens) if n > 1]
        # What a speculation guessed, or a short turn. More queries would write more parts than they read keys.
        short = [s for s in several if self.split_queries and lens[s] <= tokens and contexts[s] > self.split_keys]
        prefill = [(s, start) for s in several if s not in short for start in range(0, lens[s], tokens)]
        made = []
        if decoding:
            least = max(16, triton.next_power_of_2(group))  # rows of a matrix product
            made.append(self._launch([(s, 0) for s in decoding], 1, least, split=True))
        if prefill:
            made.append(self._launch(prefill, tokens, rows, split=False))
        if short:
            tokens = max(tokens // 2, 1)  # half a tile: with a whole one, Q8_0 caches spill 8 bytes on sm_80 and sm_120
            pairs = [(s, start) for s in short for start in range(0, lens[s], tokens)]
            made.append(self._launch(pairs, tokens, max(rows // 2, triton.next_power_of_2(group)), split=True))
        return made

    def _launch(self, pairs: list[tuple[int, int]], tokens: int, rows: int, split: bool) -> Launch:
        count, device = len(pairs), self.batch.block_table.device
        contexts = [self.batch.context_lens[s] for s, _ in pairs]
        longest = triton.cdiv(max(contexts), self.split_keys) if split else 0
        splits = longest if longest > 1 else 0
        if count == self.batch.num_seqs and self.batch.num_tokens == count:  # decoding alone: nothing to copy to the device
            sequence = torch.arange(count, dtype=torch.int32, device=device)
            return Launch(sequence, torch.zeros_like(sequence), sequence * splits, tokens, rows, splits, count * splits)
        parts = [triton.cdiv(context, self.split_keys) if splits else 0 for context in contexts]
        starts = [0, *accumulate(parts)]
        table = [(s, first, start) for (s, first), start in zip(pairs, starts, strict=False)]
        sequence, first, part = sent(torch.tensor(table, dtype=torch.int32).t().contiguous(), device)
        return Launch(sequence, first, part, tokens, rows, splits, starts[-1])


def plan(batch: Batch, cache: KVCache) -> AttentionPlan:
    rows = TILE_ROWS // 2 if cache.key.dtype == torch.float32 else TILE_ROWS
    return AttentionPlan(batch, rows, tuning.of(cache.key.device).split_keys, not tuning.invariant())
