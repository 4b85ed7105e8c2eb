"""From a Schedule to a Batch: host lists become the tensors of one forward pass. Knows no policy and no model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ollamapy.engine.batch import Batch
from ollamapy.engine.block_check import GONE
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.sequence import Sequence


def build_batch(step: Schedule, block_size: int, device: torch.device) -> Batch:
    """All tensors are views of two buffers, one of int64 and one of int32, so that a GPU is sent two copies, not seven."""
    sequences, query_lens = step.sequences, step.num_tokens
    count, total = len(sequences), sum(query_lens)
    width = max(seq.num_blocks for seq in sequences)
    groups = len(sequences[0].block_tables)
    wanted = wanted_rows(step)
    last = (2 + groups) * total
    wide = np.empty(last + len(wanted), dtype=np.int64)
    narrow = np.zeros(2 * count + 1 + groups * count * width, dtype=np.int32)
    token_ids, positions, slots = wide[:total], wide[total : 2 * total], wide[2 * total : last].reshape(groups, total)
    wide[last:] = wanted
    query_start, seq_lens = narrow[: count + 1], narrow[count + 1 : 2 * count + 1]
    tables = narrow[2 * count + 1 :].reshape(groups, count, width)

    computed = [seq.num_computed for seq in sequences]
    context_lens = [start + length for start, length in zip(computed, query_lens, strict=True)]
    np.cumsum(query_lens, out=query_start[1:])
    seq_lens[:] = context_lens
    row = 0
    for index, (seq, start, end) in enumerate(zip(sequences, computed, context_lens, strict=True)):
        own = seq.token_ids[start:end]
        token_ids[row : row + len(own)] = own
        if len(own) < end - start:
            token_ids[row + len(own) : row + end - start] = seq.draft[: end - start - len(own)]
        _fill_tables(tables[:, index], seq)
        row += end - start
    if total == count:
        owner: np.ndarray[tuple[int], np.dtype[np.int64]] = np.arange(count)
        positions[:] = computed
    else:
        owner = np.repeat(np.arange(count), query_lens)
        positions[:] = np.arange(total) + (np.asarray(computed) - query_start[:-1])[owner]
    slots[:] = tables[:, owner, positions // block_size] * block_size + positions % block_size

    wide_tensor = torch.from_numpy(wide).to(device, non_blocking=True)
    narrow_tensor = torch.from_numpy(narrow).to(device, non_blocking=True)
    slot_mappings = wide_tensor[2 * total : last].view(groups, total)
    block_tables = narrow_tensor[2 * count + 1 :].view(groups, count, width)
    batch = Batch(
        token_ids=wide_tensor[:total],
        positions=wide_tensor[total : 2 * total],
        slot_mapping=slot_mappings[0],
        block_table=block_tables[0],
        query_start=narrow_tensor[: count + 1],
        seq_lens=narrow_tensor[count + 1 : 2 * count + 1],
        logit_rows=wide_tensor[last:],
        query_lens=query_lens,
        context_lens=context_lens,
    )
    batch.others = [
        replace(batch, slot_mapping=slot_mappings[group], block_table=block_tables[group]) for group in range(1, groups)
    ]
    return batch


def _fill_tables(rows: np.ndarray[tuple[int, int], np.dtype[np.int32]], seq: Sequence) -> None:
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
