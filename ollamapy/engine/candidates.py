"""The likeliest tokens of each row of logits, without sorting the vocabulary. Knows no request and no sampling parameter.

The order is total: higher logit first, lower token id first among equals. So a row's candidates do not depend on how many
are asked for, on the rows beside it, or on the device's way to break ties.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES = 32  # a row is read as LANES x columns; 65 of 262,144 take 0.06 ms so, 0.28 ms by topk of the whole row (2 cores)


def largest(logits: Tensor, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `count` largest logits (n, V) of each row and their token ids, both (n, min(count, V)).

    A row with a NaN has it first.
    """
    size = min(count, logits.shape[1])
    fetched = min(size + 1, logits.shape[1])  # one more shows whether the last place is contested by equals
    best, where = _topk(logits, fetched)
    values, ids = best.float().cpu().numpy(), where.cpu().numpy()
    for row in np.flatnonzero((values[:, 1:] == values[:, :-1]).any(axis=1)):
        _order_ties(logits[row], values[row], ids[row])
    return values[:, :size], ids[:, :size]


def all_sorted(row: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All logits (V,) of one row and their token ids, in order. 23 ms for 262,144 tokens."""
    values, ids = row.sort(descending=True, stable=True)
    return values.float().cpu().numpy(), ids.cpu().numpy()


def _topk(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Every one of the `count` largest is in one of the `count` columns of the largest maxima (or in the rest of the row)."""
    num_rows, size = logits.shape
    columns = size // LANES
    if columns < 8 * count:
        best, where = logits.topk(count, dim=1)
        return best, where
    rest = columns * LANES
    body = logits[:, :rest].view(num_rows, LANES, columns)
    chosen = body.amax(1).topk(count, dim=1, sorted=False).indices  # (n, count)
    picked = body.gather(2, chosen.unsqueeze(1).expand(-1, LANES, -1)).flatten(1)
    lanes = torch.arange(0, rest, columns, device=logits.device).view(1, LANES, 1)
    ids = (chosen.unsqueeze(1) + lanes).flatten(1)
    if rest < size:
        picked = torch.cat((picked, logits[:, rest:]), 1)
        ids = torch.cat((ids, torch.arange(rest, size, device=logits.device).expand(num_rows, -1)), 1)
    best, where = picked.topk(count, dim=1)
    return best, ids.gather(1, where)


def _order_ties(row: Tensor, values: NDArray[np.float32], ids: NDArray[np.int64]) -> None:
    """Puts equal values in the order of their ids; where equals are cut off by the end, the lowest ids of all come in."""
    last = values[-1]
    if len(values) < row.shape[0] and values[-2] == last and np.isfinite(last):
        above = int((values > last).sum())
        equal = (row == float(last)).nonzero().flatten()[: len(values) - above]
        ids[above:] = equal.cpu().numpy()
    ids[:] = ids[np.lexsort((ids, -values))]
