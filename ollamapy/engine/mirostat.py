"""Mirostat: keeps the surprise of what is generated near a target, in place of top_k, top_p and the other filters.

Basu et al. 2021, in llama.cpp's form. `Sequence.mu[g]` is the bound on the surprise of generated token g, in bits; a step
that is run again finds the same one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ListLike

import msgspec
import numpy as np
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.filters import Floats
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sequence import Sequence

NUM_ESTIMATED = 100  # likeliest tokens that version 1 fits its power law to
_FILTERS_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "xtc_probability": 0.0}


def is_on(params: SamplingParams) -> bool:
    return params.mirostat in (1, 2) and params.temperature > 0.0


def bound(logits: Tensor, sequences: ListLike[Sequence]) -> list[SamplingParams]:
    """What rows of logits (n, V) are to be drawn by; those under mirostat are divided by their temperature, in place."""
    params = [seq.params for seq in sequences]
    rows = [row for row, p in enumerate(params) if is_on(p)]
    if not rows:
        return params
    for row in rows:
        logits[row] /= params[row].temperature
    part = logits if len(rows) == len(params) else logits[rows]
    totals, best = ops.log_totals(part), ops.largest(part, NUM_ESTIMATED)[0].astype(np.float64)
    for row, total, values in zip(rows, totals.tolist(), best, strict=True):
        mu = sequences[row].mu[sequences[row].num_generated]
        if params[row].mirostat == 2:
            least = math.exp(min(total - values[0] - mu * math.log(2.0), 0.0)) if math.isfinite(total) else 1.0
            own: dict[str, float] = {"min_p": least}
        else:
            own = {"top_k": num_kept(values[np.isfinite(values)], mu, logits.shape[1])}
        params[row] = msgspec.structs.replace(params[row], **{**_FILTERS_OFF, **own})
    return params


def num_kept(logits: Floats, mu: float, size: int) -> int:
    """How many of `size` tokens have a surprise of at most mu, were their probabilities those of a Zipf law fitted to the
    likeliest, whose logits are given."""
    ratios = np.log(np.arange(2, len(logits) + 1) / np.arange(1, len(logits)))
    if not len(ratios):
        return 1
    slope = np.float64(ratios @ (logits[:-1] - logits[1:]) / (ratios @ ratios))
    with np.errstate(all="ignore"):
        kept = float(((slope - 1.0) * np.float64(2.0) ** mu / (1.0 - size ** (1.0 - slope))) ** (1.0 / slope))
    return max(int(kept), 1) if kept < size else size


def learn(sequences: ListLike[Sequence], probabilities: Floats) -> None:
    """Moves mu on by the probability, among those kept, of each sequence's token."""
    for seq, probability in zip(sequences, probabilities.tolist(), strict=True):
        if is_on(seq.params) and probability > 0.0:
            surprise = -math.log2(probability)
            mu = seq.mu[seq.num_generated] - seq.params.mirostat_eta * (surprise - seq.params.mirostat_tau)
            seq.mu[seq.num_generated + 1 :] = [mu]
