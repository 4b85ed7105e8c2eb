"""DRY: penalises tokens that would go on with a repetition, the more the longer it is already (p-e-w 2024, as in llama.cpp)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ollamapy.engine.sequence import Sequence

LOG_MOST = 88.7228391  # of the largest float32: a power never exceeds it


def penalties(seq: Sequence) -> dict[int, float]:
    """Token id -> what its logit changes by: -multiplier * base ^ (length - allowed_length), where the last `length` tokens
    stand earlier in the last `dry_penalty_last_n` too, followed by that token. No match goes past a sequence breaker."""
    params = seq.params
    last_n = seq.context_length if params.dry_penalty_last_n < 0 else params.dry_penalty_last_n
    if params.dry_multiplier == 0.0 or params.dry_base < 1.0 or last_n == 0:
        return {}
    recent = np.array(seq.token_ids[-last_n:], dtype=np.int64)
    limit, allowed = _since_breaker(recent, seq), max(params.dry_allowed_length, 0)
    if limit < allowed or len(recent) <= allowed:
        return {}
    most = int(LOG_MOST / math.log(params.dry_base)) if params.dry_base > 1.000001 else len(recent)
    lengths = repeated(recent, min(limit, allowed + most))
    found: dict[int, float] = {}
    for place in np.flatnonzero(lengths >= allowed).tolist():
        token_id, excess = int(recent[place + 1]), int(lengths[place]) - allowed
        found[token_id] = min(found.get(token_id, 0.0), -params.dry_multiplier * params.dry_base**excess)
    return found


def repeated(recent: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """For each place but the last, how many tokens up to it equal the last ones of all, at most `limit`: (n - 1,)."""
    last = len(recent) - 1
    lengths = np.zeros(last, dtype=np.int64)
    places = np.arange(last)
    for length in range(min(limit, last)):
        places = places[places >= length]
        places = places[recent[places - length] == recent[last - length]]
        if not len(places):
            break
        lengths[places] = length + 1
    return lengths


def _since_breaker(recent: NDArray[np.int64], seq: Sequence) -> int:
    """Tokens after the last sequence breaker; all when there is none."""
    params, size = seq.params, len(recent)
    since = size
    if params.dry_breakers:
        if seq.breakers is None:  # up to the whole vocabulary: not to be made anew for each token
            seq.breakers = np.array(params.dry_breakers, dtype=np.int64)
        single = np.flatnonzero(np.isin(recent, seq.breakers))
        since = size - 1 - int(single[-1]) if len(single) else size
    for breaker in params.dry_breaker_sequences:
        earliest = max(size - since - len(breaker) + 1, 0)  # one that begins before ends before the last one found
        starts = earliest + np.flatnonzero(recent[earliest : max(size - len(breaker) + 1, earliest)] == breaker[0])
        for at, token_id in enumerate(breaker[1:], start=1):
            starts = starts[recent[starts + at] == token_id]
        if len(starts):
            since = size - len(breaker) - int(starts[-1])
    return since
