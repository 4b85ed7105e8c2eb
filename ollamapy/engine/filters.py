"""What a sampler does to a row's candidates: filters in llama.cpp's order, temperature, draw. On the host, in float64.

Candidates are at most some hundred per row, so numpy does this in 0.2 ms for 32 rows, and every row is computed the same
way whatever else is in the batch: elementwise operations and running sums along the row, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ollamapy.engine.protocol import SamplingParams

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]
MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
STREAM = 0xD1B54A32D192ED03


@dataclass(slots=True)
class Candidates:
    """Rows of candidate tokens, likeliest first. `weights` are probabilities times an unknown factor per row."""

    logits: Floats  # (n, K) descending
    kept: NDArray[np.bool_]  # (n, K)
    weights: Floats  # (n, K), 0 where not kept
    total: Floats  # (n, 1), sum of the weights of all tokens kept, those beyond the K included

    @classmethod
    def of(cls, values: NDArray[np.float32], log_totals: Floats | None = None) -> Candidates:
        """`log_totals` (n,): log-sum-exp of whole rows, where `values` (n, K) are the head of what is kept; None: all of it."""
        logits = values.astype(np.float64)
        best = logits[:, :1]
        weights = np.exp(logits - best)
        total = _sums(weights) if log_totals is None else np.exp(log_totals[:, None] - best)
        return cls(logits, np.ones(logits.shape, dtype=np.bool_), weights, total)

    def keep(self, chosen: NDArray[np.bool_]) -> None:
        """Narrows to `chosen` and makes the total that of what is left. Never leaves a row empty."""
        self.kept &= chosen
        self.weights = np.where(self.kept, self.weights, 0.0)
        self.total = _sums(self.weights)


def keep_top_k(rows: Candidates, params: Sequence[SamplingParams]) -> None:
    """The k likeliest; k <= 0: all."""
    limits = np.array([p.top_k if p.top_k > 0 else rows.logits.shape[1] for p in params])
    if limits.min() < rows.logits.shape[1]:
        rows.keep(np.arange(rows.logits.shape[1]) < limits[:, None])


def keep_typical_p(rows: Candidates, params: Sequence[SamplingParams]) -> None:
    """The tokens whose surprise is nearest to the entropy, until their mass exceeds p (Meister et al. 2022)."""
    narrowed = [row for row, p in enumerate(params) if p.typical_p < 1.0]
    if not narrowed:
        return
    chosen = np.ones_like(rows.kept)
    for row in narrowed:
        probability = rows.weights[row] / rows.total[row]
        surprise = -np.log(probability, out=np.full_like(probability, -np.inf), where=probability > 0.0)
        entropy = np.cumsum(probability * np.where(probability > 0.0, surprise, 0.0))[-1]
        order = np.argsort(np.where(rows.kept[row], np.abs(surprise - entropy), np.inf), kind="stable")
        count = int((np.cumsum(probability[order]) <= params[row].typical_p).sum()) + 1
        chosen[row] = False
        chosen[row, order[:count]] = True
    rows.keep(chosen)


def keep_top_p(rows: Candidates, params: Sequence[SamplingParams]) -> None:
    """The smallest head whose mass reaches p, at least one token; p >= 1: all."""
    limits = np.array([p.top_p if p.top_p < 1.0 else np.inf for p in params])[:, None]
    if limits.min() < np.inf:
        before = np.zeros_like(rows.weights)
        np.cumsum(rows.weights[:, :-1], axis=1, out=before[:, 1:])
        rows.keep((before < limits * rows.total) | (before == 0.0))


def keep_min_p(rows: Candidates, params: Sequence[SamplingParams]) -> None:
    """Tokens at least p times as likely as the likeliest; p <= 0: all."""
    limits = np.array([min(p.min_p, 1.0) for p in params])[:, None]
    if limits.max() > 0.0:
        rows.keep((rows.weights >= limits * rows.weights.max(axis=1, keepdims=True)) | (limits <= 0.0))


def drop_likeliest(rows: Candidates, params: Sequence[SamplingParams], uniforms: Floats) -> None:
    """XTC (p-e-w 2024): with some probability, of the tokens that have at least the threshold only the least likely stays."""
    chosen = np.ones_like(rows.kept)
    for row, p in enumerate(params):
        if 0.0 < p.xtc_threshold <= 0.5 and uniforms[row] < p.xtc_probability:
            choices = np.flatnonzero(rows.kept[row] & (rows.weights[row] >= p.xtc_threshold * rows.total[row]))
            chosen[row, choices[:-1]] = False
    if not chosen.all():
        rows.keep(chosen)


def decide(rows: Candidates, params: Sequence[SamplingParams], uniforms: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Filters and draws: index of the candidate of each row (n,), and its probability among those kept (n,).

    `uniforms` (n, 2): the first decides the token, the second whether XTC takes part.
    """
    keep_top_k(rows, params)
    keep_typical_p(rows, params)
    keep_top_p(rows, params)
    keep_min_p(rows, params)
    drop_likeliest(rows, params, uniforms[:, 1])
    return draw(rows, params, uniforms[:, 0])


def draw(rows: Candidates, params: Sequence[SamplingParams], uniforms: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Divides the logits by the temperature and draws: index of the candidate of each row (n,), and its probability (n,).

    `uniforms` (n,) in [0, 1). Temperature <= 0 takes the likeliest, whatever is kept.
    """
    best = np.where(rows.kept, rows.logits, -np.inf).max(axis=1, keepdims=True)
    temperatures = np.array([p.temperature if p.temperature > 0.0 else 1.0 for p in params])[:, None]
    with np.errstate(over="ignore"):
        weights = np.where(rows.kept, np.exp((rows.logits - best) / temperatures), 0.0)
    running = np.cumsum(weights, axis=1)
    target = uniforms[:, None] * running[:, -1:]
    chosen = (running <= target).sum(axis=1)
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0.0, axis=1)  # u * total may round up to total
    greedy = np.array([p.temperature <= 0.0 for p in params])
    picked: NDArray[np.int64] = np.where(greedy, 0, np.minimum(chosen, last))
    probabilities = np.where(greedy, 1.0, weights[np.arange(len(picked)), picked] / running[:, -1])
    return picked, probabilities


def draw_unfiltered(logits: NDArray[np.float32], temperature: float, uniform: float) -> tuple[int, float]:
    """Token id drawn from softmax(logits / temperature) of one whole row (V,), and its probability."""
    values = logits.astype(np.float64)
    values -= values.max()
    with np.errstate(over="ignore"):
        values /= temperature
    running = np.cumsum(np.exp(values, out=values))
    picked = int(np.searchsorted(running, min(uniform * running[-1], np.nextafter(running[-1], 0.0)), side="right"))
    return picked, float(values[picked] / running[-1])


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """The number in [0, 1) that decides token `position` of a request: splitmix64 (Steele et al. 2014) used as a counter.

    Streams of one seed are independent of each other.
    """
    bits = _mix(_mix((seed ^ stream * STREAM) & MASK) + (position + 1) * GAMMA)
    return (bits >> 11) * 2.0**-53


def _mix(state: int) -> int:
    bits = (state + GAMMA) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def _sums(weights: Floats) -> Floats:
    """(n, K) -> (n, 1), added from the left: zeros at the end change no bit."""
    total: Floats = np.cumsum(weights, axis=1)[:, -1:]
    return total
