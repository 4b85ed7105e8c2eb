"""Sampling's ops on rows of logits: changes, masks, the likeliest tokens, totals, one token drawn. Knows no sequence and no
grammar.

The order is total: higher logit first, lower token id first among equals. So a row's candidates do not depend on how many
are asked for, on the rows beside it, or on the device's way to break ties. No row is sorted that a part of it can decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ollamapy.engine import filters
from ollamapy.engine.edits import Edits
from ollamapy.engine.filters import Candidates, Floats, Ids
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.transfer import sent

LANES = 32  # a row is read as LANES x columns; 65 of 262,144 take 0.06 ms so, 0.28 ms by topk of the whole row (2 cores)
GREEDY = 1  # candidates that a greedy row needs
LEVELS = (64, 256, 1024)  # candidates fetched for a row with top_k: the first that is enough
HEAD = 512  # candidates fetched for a row that has top_p or min_p only; they reach further at high temperatures alone
WHOLE = 1 << 62  # the row needs its whole vocabulary


def largest(logits: Tensor, count: int) -> tuple[NDArray[np.float32], Ids]:
    """The `count` > 0 largest logits (n, V) of each row and their token ids, both (n, min(count, V)).

    A row with a NaN has it first.
    """
    size = min(count, logits.shape[1])
    fetched = min(size + 1, logits.shape[1])  # one more shows whether the last place is contested by equals
    best, where = _topk(logits, fetched)
    values, ids = best.float().cpu().numpy(), where.cpu().numpy()
    for row in np.flatnonzero((values[:, 1:] == values[:, :-1]).any(axis=1)):
        _order_ties(logits[row], values[row], ids[row])
    return values[:, :size], ids[:, :size]


def log_totals(logits: Tensor) -> Floats:
    """log(sum(exp(row))) of rows (n, V); not finite where a row is not. Row by row: torch's reduction of one row does not
    depend on the others then, and on a CPU that is also three times as fast at 262,144 columns."""
    totals = torch.cat([torch.logsumexp(row.unsqueeze(0), 1) for row in logits])
    found: Floats = totals.double().cpu().numpy()
    return found


def edit(logits: Tensor, edits: Edits) -> None:
    """Changes single logits (n, V) float32, in place: see `Edits`. Waits for no device."""
    device, bounds = logits.device, edits.bounds
    lengths = bounds[:, 1:] - bounds[:, :-1]
    rows = np.repeat(edits.rows, bounds[:, 3] - bounds[:, 0])
    for kind in np.flatnonzero(lengths.any(0)).tolist():
        own: slice | NDArray[np.int64] = slice(None)
        if lengths[:, kind].sum() < len(rows):
            own = np.concatenate([np.arange(begin, end) for begin, end in bounds[:, kind : kind + 2].tolist()])
        at, ids = (sent(torch.from_numpy(each[own].astype(np.int64)), device) for each in (rows, edits.ids))
        values, found = edits.values[own], logits[at, ids]
        if kind == 1:
            repeat, frequency, presence = np.repeat(edits.factors, lengths[:, 1], axis=0).T
            values = values * frequency + presence
            factor = sent(torch.from_numpy(repeat.copy()), device)
            found = torch.where(found <= 0, found * factor, found / factor)
        logits[at, ids] = found + sent(torch.from_numpy(values), device)
    for begin, end in sorted({(begin, end) for begin, end in edits.spans.tolist() if begin < end}):
        same = edits.rows[(edits.spans == (begin, end)).all(1)].astype(np.int64)
        if len(same) == logits.shape[0]:
            logits.index_fill_(1, edits.never[begin:end], -math.inf)
        else:
            logits[sent(torch.from_numpy(same), device).unsqueeze(1), edits.never[begin:end]] = -math.inf


def forbid(logits: Tensor, rows: Sequence[int], bits: NDArray[np.int32]) -> None:
    """Puts minus infinity into each of the rows (h,) of logits (n, V) float32, in place, where bit v % 32 of word v // 32 of
    its bits (h, at least V / 32) is 0. Waits for no device."""
    forbidden = np.unpackbits(~bits.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    for row, mask in zip(rows, sent(torch.from_numpy(forbidden), logits.device), strict=True):
        logits[row].masked_fill_(mask, -math.inf)


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Floats) -> tuple[Ids, Floats]:
    """One token of each row of logits (n, V) by its parameters' filters and temperature: ids (n,), -1 where the largest logit
    is NaN or infinite, and their probabilities (n,) among the tokens that the filters kept.

    `uniforms` (n, 2) in [0, 1): the first decides the token, the second whether XTC takes part.
    """
    vocab_size = logits.shape[1]
    counts = [num_candidates(p, vocab_size) for p in params]
    if any(count == LEVELS[0] for count in counts):  # one pass serves both, and a greedy row's token is the first either way
        counts = [LEVELS[0] if count == GREEDY else count for count in counts]
    tokens, probabilities = np.full(len(params), -1, dtype=np.int64), np.zeros(len(params))
    for count in sorted(set(counts)):
        rows = [row for row, own in enumerate(counts) if own == count]
        if count == WHOLE:
            for row in rows:
                tokens[row], probabilities[row] = _whole(logits[row], params[row], uniforms[row])
        else:
            part = logits if len(rows) == len(counts) else logits[rows]
            tokens[rows], probabilities[rows] = _head(part, [params[row] for row in rows], uniforms[rows], count)
    return tokens, probabilities


def num_candidates(params: SamplingParams, vocab_size: int) -> int:
    """How many candidates are fetched to decide a row: one of the constants above. Rows of one number are drawn together."""
    if params.temperature <= 0.0:
        return GREEDY
    if 0 < params.top_k < vocab_size:
        return next((level for level in LEVELS if params.top_k <= level), WHOLE)
    filtered = params.top_p < 1.0 or params.min_p > 0.0
    return HEAD if filtered and params.typical_p >= 1.0 and vocab_size > HEAD else WHOLE


def _head(logits: Tensor, params: list[SamplingParams], uniforms: Floats, count: int) -> tuple[Ids, Floats]:
    """Rows that `count` candidates decide, or, of those without top_k, show that they need more."""
    values, ids = largest(logits, count)
    finite = np.isfinite(values[:, 0])
    values = np.where(finite[:, None], values, np.float32(0.0))
    rows = Candidates.of(values, np.where(finite, log_totals(logits), 0.0) if count == HEAD else None)
    picked, probabilities = filters.decide(rows, params, uniforms)
    tokens = np.where(finite, ids[np.arange(len(ids)), picked], -1)
    if count == HEAD:
        beyond = finite & (np.where(rows.kept, values, np.inf).min(axis=1) == values[:, -1])
        for row in np.flatnonzero(beyond):
            tokens[row], probabilities[row] = _whole(logits[row], params[row], uniforms[row])
    return tokens, probabilities


def _whole(logits: Tensor, p: SamplingParams, uniforms: Floats) -> tuple[int, float]:
    """One row (V,) that takes its whole vocabulary to decide; sorted only where a filter asks for it."""
    if not math.isfinite(float(logits.amax())):
        return -1, 0.0
    if not 0 < p.top_k < len(logits) and p.top_p >= 1.0 and p.min_p <= 0.0 and p.typical_p >= 1.0 and p.xtc_probability <= 0.0:
        return filters.draw_unfiltered(logits.float().cpu().numpy(), p.temperature, uniforms[0])
    values, ids = logits.sort(descending=True, stable=True)  # 23 ms for 262,144 tokens
    rows = Candidates.of(values.float().cpu().numpy()[None])
    picked, probabilities = filters.decide(rows, [p], uniforms[None])
    return int(ids[picked[0]]), float(probabilities[0])


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


def _order_ties(row: Tensor, values: NDArray[np.float32], ids: Ids) -> None:
    """Puts equal values in the order of their ids; where equals are cut off by the end, the lowest ids of all come in."""
    last = values[-1]
    if len(values) < row.shape[0] and values[-2] == last and np.isfinite(last):
        above = int((values > last).sum())
        equal = (row == float(last)).nonzero().flatten()[: len(values) - above]
        ids[above:] = equal.cpu().numpy()
    ids[:] = ids[np.lexsort((ids, -values))]
