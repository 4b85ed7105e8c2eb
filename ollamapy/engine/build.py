"""From a Schedule to a Batch: host lists become the tensors of one forward pass. Knows no policy and no model."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ollamapy.engine.batch import Batch
from ollamapy.engine.block_check import GONE
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.sequence import Sequence
from ollamapy.engine.transfer import sent


class Shape(NamedTuple):
    """The sizes of a batch, and with them where its facts lie in its two buffers."""

    num_seqs: int
    num_tokens: int
    num_logits: int
    num_groups: int
    width: int  # of its block tables

    @property
    def num_wide(self) -> int:
        return (2 + self.num_groups) * self.num_tokens + self.num_logits

    @property
    def num_narrow(self) -> int:
        return 2 * self.num_seqs + 1 + self.num_groups * self.num_seqs * self.width

    def parts(self, wide: Any, narrow: Any) -> Parts:
        """Views of an int64 and an int32 buffer, tensors or arrays."""
        count, total = self.num_seqs, self.num_tokens
        last = (2 + self.num_groups) * total
        return Parts(
            token_ids=wide[:total],
            positions=wide[total : 2 * total],
            slots=wide[2 * total : last].reshape(self.num_groups, total),
            logit_rows=wide[last:],
            query_start=narrow[: count + 1],
            seq_lens=narrow[count + 1 : 2 * count + 1],
            tables=narrow[2 * count + 1 :].reshape(self.num_groups, count, self.width),
        )


class Parts(NamedTuple):
    """The fields of a Batch, those of all groups together."""

    token_ids: Any
    positions: Any
    slots: Any  # (groups, num_tokens)
    logit_rows: Any
    query_start: Any
    seq_lens: Any
    tables: Any  # (groups, num_seqs, width)


def build_batch(step: Schedule, block_size: int, device: torch.device) -> Batch:
    """All tensors are views of two buffers, one of int64 and one of int32, so that a GPU is sent two copies, not seven."""
    sequences = step.sequences
    wanted = wanted_rows(step)
    width = max(seq.num_blocks for seq in sequences)
    shape = Shape(len(sequences), sum(step.num_tokens), len(wanted), len(sequences[0].block_tables), width)
    wide, narrow = np.zeros(shape.num_wide, dtype=np.int64), np.zeros(shape.num_narrow, dtype=np.int32)
    parts = shape.parts(wide, narrow)
    context_lens = fill(parts, step, block_size)
    parts.logit_rows[:] = wanted
    buffers = sent(torch.from_numpy(wide), device), sent(torch.from_numpy(narrow), device)
    return as_batch(shape, *buffers, step.num_tokens, context_lens)


def fill(parts: Parts, step: Schedule, block_size: int) -> list[int]:
    """Writes a step to the first rows of `parts`, but for the rows wanted; the tokens in the cache after it, by sequence.

    A token that is not known yet (`Schedule.ahead`) is left as it is.
    """
    sequences, query_lens = step.sequences, step.num_tokens
    count, total = len(sequences), sum(query_lens)
    computed = [seq.num_computed + step.ahead for seq in sequences]
    context_lens = [start + length for start, length in zip(computed, query_lens, strict=True)]
    np.cumsum(query_lens, out=parts.query_start[1 : count + 1])
    parts.seq_lens[:count] = context_lens
    row = 0
    for index, (seq, start, end) in enumerate(zip(sequences, computed, context_lens, strict=True)):
        own = seq.token_ids[start:end]
        parts.token_ids[row : row + len(own)] = own
        if len(own) < end - start and not step.ahead:
            parts.token_ids[row + len(own) : row + end - start] = seq.draft[: end - start - len(own)]
        _fill_tables(parts.tables[:, index], seq)
        row += end - start
    owner: NDArray[np.int64] = np.arange(count)
    positions = parts.positions[:total]
    if total == count:
        positions[:] = computed
    else:
        owner = np.repeat(owner, query_lens)
        positions[:] = np.arange(total) + (np.asarray(computed) - parts.query_start[:count])[owner]
    parts.slots[:, :total] = parts.tables[:, owner, positions // block_size] * block_size + positions % block_size
    return context_lens


def as_batch(shape: Shape, wide: Tensor, narrow: Tensor, query_lens: ListLike[int], context_lens: ListLike[int]) -> Batch:
    """The batch whose tensors are views of `wide` and `narrow`."""
    parts = shape.parts(wide, narrow)
    batch = Batch(
        token_ids=parts.token_ids,
        positions=parts.positions,
        slot_mapping=parts.slots[0],
        block_table=parts.tables[0],
        query_start=parts.query_start,
        seq_lens=parts.seq_lens,
        logit_rows=parts.logit_rows,
        query_lens=list(query_lens),
        context_lens=list(context_lens),
    )
    batch.others = [
        replace(batch, slot_mapping=parts.slots[group], block_table=parts.tables[group]) for group in range(1, shape.num_groups)
    ]
    return batch


def _fill_tables(rows: NDArray[np.int32], seq: Sequence) -> None:
    """Block tables (groups, width) of one sequence. Entries behind a window name a block within it: kernels may read whole
    tiles of keys and give those out of the window the weight 0, so the keys must be numbers."""
    for row, table in zip(rows, seq.block_tables, strict=True):
        held = row[: len(table)]
        held[:] = table
        if table[0] == GONE:
            gone = int(np.count_nonzero(held == GONE))
            held[:gone] = held[gone]


def wanted_rows(step: Schedule) -> list[int]:
    """Batch rows whose hidden states are wanted, in order: `num_wanted` of each sequence."""
    rows: list[int] = []
    start = 0
    for seq, length in zip(step.sequences, step.num_tokens, strict=True):
        if seq.pooling is None or seq.pooling == "last":
            count = num_wanted(seq, length)
            rows.extend(range(start + length - count, start + length))
        elif seq.pooling == "mean":
            rows.extend(range(start, start + length))
        elif seq.num_computed == 0:
            rows.append(start)
        start += length
    return rows


def num_wanted(seq: Sequence, length: int) -> int:
    """How many rows of `wanted_rows` belong to a sequence that computes `length` tokens: its last one and its
    draft's, and before them those that its prompt's logprobs need."""
    if seq.pooling == "mean":
        return length
    if seq.pooling == "cls":
        return int(seq.num_computed == 0)
    return seq.num_to_tell(length) + max(seq.num_computed + length - len(seq.token_ids) + 1, 0)
