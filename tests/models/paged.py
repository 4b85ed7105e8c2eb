"""Runs a model over a paged cache as an engine would, with everything an engine may leave behind: blocks in any order, and
NaN in every slot that was never written."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ollamapy.engine.batch import Batch
from ollamapy.models.decoder import Decoder


def make_batch(tables: Sequence[Sequence[int]], query_lens: list[int], context_lens: list[int], block_size: int) -> Batch:
    """A batch over sequences with these block tables; token ids are zeros, all rows are logit rows."""
    positions, slots, starts = [], [], [0]
    for table, query, context in zip(tables, query_lens, context_lens, strict=True):
        for position in range(context - query, context):
            positions.append(position)
            slots.append(table[position // block_size] * block_size + position % block_size)
        starts.append(starts[-1] + query)
    width = max(map(len, tables))
    return Batch(
        token_ids=torch.zeros(starts[-1], dtype=torch.int64),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        block_table=torch.tensor([[*table, *[0] * (width - len(table))] for table in tables], dtype=torch.int32),
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(context_lens, dtype=torch.int32),
        logit_rows=torch.arange(starts[-1]),
        query_lens=query_lens,
        context_lens=context_lens,
    )


class Paged:
    """Sequences by name; `run` feeds tokens to some of them and returns the hidden state of every fed token."""

    def __init__(
        self, model: Decoder, num_blocks: int = 64, block_size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        self.model, self.block_size = model, block_size
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.caches = model.new_caches(num_blocks, block_size, dtype)
        for cache in self.caches:  # what was not written must not be read
            for store in (cache.key, cache.value):
                store.fill_(255 if dtype is torch.uint8 else torch.nan)  # of q8_0, scales that are NaN

    def run(self, fed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        for name, ids in fed.items():
            self.lengths[name] = self.lengths.get(name, 0) + len(ids)
            table = self.tables.setdefault(name, [])
            while len(table) * self.block_size < self.lengths[name]:
                table.append(self.free.pop())
        batch = make_batch(
            [self.tables[name] for name in fed],
            [len(ids) for ids in fed.values()],
            [self.lengths[name] for name in fed],
            self.block_size,
        )
        batch.token_ids = torch.tensor([token for ids in fed.values() for token in ids])
        hidden = self.model(batch, self.caches)
        return dict(zip(fed, hidden.split([len(ids) for ids in fed.values()]), strict=True))

    def logits(self, fed: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Logits (tokens, V) of every fed token."""
        return {name: self.model.logits(hidden) for name, hidden in self.run(fed).items()}
