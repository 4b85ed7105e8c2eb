"""From a Schedule to a Batch: host lists become the tensors of one forward pass. Knows no policy and no model."""

from __future__ import annotations

import numpy as np
import torch

from ollamapy.engine.batch import Batch
from ollamapy.engine.scheduler import Schedule
from ollamapy.engine.sequence import Sequence


def build_batch(step: Schedule, block_size: int, device: torch.device) -> Batch:
    """All tensors are views of two buffers, one of int64 and one of int32, so that a GPU is sent two copies, not seven."""
    sequences, query_lens = step.sequences, step.num_tokens
    count, total = len(sequences), sum(query_lens)
    width = max(len(seq.block_table) for seq in sequences)
    wanted = wanted_rows(step)
    wide = np.empty(3 * total + len(wanted), dtype=np.int64)
    narrow = np.zeros(2 * count + 1 + count * width, dtype=np.int32)
    token_ids, positions, slots = wide[:total], wide[total : 2 * total], wide[2 * total : 3 * total]
    wide[3 * total :] = wanted
    query_start, seq_lens = narrow[: count + 1], narrow[count + 1 : 2 * count + 1]
    table = narrow[2 * count + 1 :].reshape(count, width)

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
        table[index, : len(seq.block_table)] = seq.block_table
        row += end - start
    if total == count:
        owner: np.ndarray[tuple[int], np.dtype[np.int64]] = np.arange(count)
        positions[:] = computed
    else:
        owner = np.repeat(np.arange(count), query_lens)
        positions[:] = np.arange(total) + (np.asarray(computed) - query_start[:-1])[owner]
    slots[:] = table[owner, positions // block_size] * block_size + positions % block_size

    wide_tensor = torch.from_numpy(wide).to(device, non_blocking=True)
    narrow_tensor = torch.from_numpy(narrow).to(device, non_blocking=True)
    return Batch(
        token_ids=wide_tensor[:total],
        positions=wide_tensor[total : 2 * total],
        slot_mapping=wide_tensor[2 * total : 3 * total],
        block_table=narrow_tensor[2 * count + 1 :].view(count, width),
        query_start=narrow_tensor[: count + 1],
        seq_lens=narrow_tensor[count + 1 : 2 * count + 1],
        logit_rows=wide_tensor[3 * total :],
        query_lens=query_lens,
        context_lens=context_lens,
    )


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
    """How many rows of `wanted_rows` belong to a sequence that computes `length` tokens: its last one and its draft's."""
    if seq.pooling == "mean":
        return length
    if seq.pooling == "cls":
        return int(seq.num_computed == 0)
    return max(seq.num_computed + length - len(seq.token_ids) + 1, 0)
