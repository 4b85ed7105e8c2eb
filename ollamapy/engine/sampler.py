"""Sampler: from raw logits to one token per row. Knows no scheduling and no text.

The steps are llama.cpp's: suppress, penalties, grammar, then filters, temperature and draw (`filters.py`). What is drawn
depends on the row's logits, its request's parameters, grammar, seed and number of generated tokens, and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ListLike

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ollamapy.engine import filters
from ollamapy.engine.candidates import all_sorted, largest
from ollamapy.engine.filters import Candidates
from ollamapy.engine.grammar import constrain
from ollamapy.engine.protocol import SamplingParams, TokenLogprob
from ollamapy.engine.sequence import Result, Sequence

GREEDY = 1  # candidates that a greedy row needs
LEVELS = (64, 256, 1024)  # candidates fetched for a row with top_k: the first that is enough
HEAD = 512  # candidates fetched for a row that has top_p or min_p only; they reach further at high temperatures alone
WHOLE = 1 << 62  # the row needs its whole vocabulary
NOT_FINITE = "the model's logits are not finite"


def num_candidates(params: SamplingParams, vocab_size: int) -> int:
    """How many candidates are fetched to decide a row: one of the constants above. Rows of one number are sampled together."""
    if params.temperature <= 0.0:
        return GREEDY
    if 0 < params.top_k < vocab_size:
        return next((level for level in LEVELS if params.top_k <= level), WHOLE)
    filtered = params.top_p < 1.0 or params.min_p > 0.0
    return HEAD if filtered and params.typical_p >= 1.0 and vocab_size > HEAD else WHOLE


class Sampler:
    """Samples batches of rows; holds nothing but index tensors of suppressed ids."""

    def __init__(self) -> None:
        self._suppressed: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: ListLike[Sequence]) -> list[Result]:
        """One result per row of logits (n, V) float32, which are overwritten. Raises what torch raises."""
        asked = [row for row, seq in enumerate(sequences) if seq.params.logprobs >= 0]
        raw = logits[asked] if asked else None  # a copy: logprobs are those of the model, before anything is done to them
        self._suppress(logits, sequences)
        penalize(logits, sequences)
        constrain(logits, [seq.grammar for seq in sequences])
        tokens = choose(logits, sequences)
        results = [Result(token) if token >= 0 else _failure(seq) for token, seq in zip(tokens, sequences, strict=True)]
        if raw is not None:
            found = logprobs(raw, [tokens[row] for row in asked], [sequences[row].params.logprobs for row in asked])
            for row, logprob in zip(asked, found, strict=True):
                if tokens[row] >= 0:
                    finite = math.isfinite(logprob.logprob)
                    results[row] = Result(tokens[row], logprob) if finite else Result(error=NOT_FINITE)
        return results

    def _suppress(self, logits: Tensor, sequences: ListLike[Sequence]) -> None:
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, seq in enumerate(sequences):
            if seq.params.suppress_ids:
                groups.setdefault(seq.params.suppress_ids, []).append(row)
        for ids, rows in groups.items():
            index = self._suppressed.get(ids)
            if index is None:
                valid = [token_id for token_id in ids if 0 <= token_id < logits.shape[1]]
                index = self._suppressed[ids] = torch.tensor(valid, dtype=torch.int64, device=logits.device)
            if len(rows) == logits.shape[0]:
                logits.index_fill_(1, index, -math.inf)
            else:
                logits[torch.tensor(rows, device=logits.device).unsqueeze(1), index] = -math.inf


def _failure(seq: Sequence) -> Result:
    """A row without a largest logit: the model's fault, or that of a grammar that allows no token."""
    return Result(error=(seq.grammar.error if seq.grammar is not None else "") or NOT_FINITE)


def penalize(logits: Tensor, sequences: ListLike[Sequence]) -> None:
    """For each token of a request's window: logit *= repeat (or /= when positive), then -= count * frequency + presence."""
    rows = [(row, seq.penalties.counts, seq.params) for row, seq in enumerate(sequences) if seq.penalties is not None]
    if not rows:
        return
    lengths = [len(counts) for _, counts, _ in rows]
    where = np.repeat([row for row, _, _ in rows], lengths)
    ids = np.fromiter((token_id for _, counts, _ in rows for token_id in counts), np.int64, len(where))
    times = np.fromiter((count for _, counts, _ in rows for count in counts.values()), np.float32, len(where))
    factors = np.array([(p.repeat_penalty, p.frequency_penalty, p.presence_penalty) for *_, p in rows], dtype=np.float32)
    repeat, frequency, presence = np.repeat(factors, lengths, axis=0).T
    index = (torch.from_numpy(where).to(logits.device), torch.from_numpy(ids).to(logits.device))
    factor = torch.from_numpy(repeat.copy()).to(logits.device)
    less = torch.from_numpy(times * frequency + presence).to(logits.device)
    values = logits[index]
    logits[index] = torch.where(values <= 0, values * factor, values / factor) - less


def choose(logits: Tensor, sequences: ListLike[Sequence]) -> list[int]:
    """Token id of each row; -1 where its largest logit is NaN or infinite."""
    vocab_size = logits.shape[1]
    counts = [num_candidates(seq.params, vocab_size) for seq in sequences]
    if any(count == LEVELS[0] for count in counts):  # one pass serves both, and a greedy row's token is the first either way
        counts = [LEVELS[0] if count == GREEDY else count for count in counts]
    tokens = [-1] * len(sequences)
    for count in sorted(set(counts)):
        rows = [row for row, own in enumerate(counts) if own == count]
        chosen = [sequences[row] for row in rows]
        part = logits if len(rows) == len(counts) else logits[rows]
        found = (
            [_whole(row, seq) for row, seq in zip(part, chosen, strict=True)] if count == WHOLE else _head(part, chosen, count)
        )
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    return tokens


def _head(logits: Tensor, sequences: ListLike[Sequence], count: int) -> list[int]:
    """Rows that `count` candidates decide, or, of those without top_k, show that they need more."""
    values, ids = largest(logits, count)
    finite = np.isfinite(values[:, 0])
    if count == GREEDY:
        return _ids(np.where(finite, ids[:, 0], -1))
    values = np.where(finite[:, None], values, np.float32(0.0))
    totals = np.where(finite, log_totals(logits), 0.0) if count == HEAD else None
    rows = Candidates.of(values, totals)
    params = [seq.params for seq in sequences]
    for step in filters.FILTERS:
        step(rows, params)
    picked = filters.draw(rows, params, np.array([_uniform(seq) for seq in sequences]))
    tokens = _ids(np.where(finite, ids[np.arange(len(ids)), picked], -1))
    if count == HEAD:
        beyond = finite & (np.where(rows.kept, values, np.inf).min(axis=1) == values[:, -1])
        for row in np.flatnonzero(beyond).tolist():
            tokens[row] = _whole(logits[row], sequences[row])
    return tokens


def _whole(logits: Tensor, seq: Sequence) -> int:
    """One row (V,) that takes its whole vocabulary to decide; sorted only where a filter asks for it. -1: not finite."""
    p = seq.params
    if not math.isfinite(float(logits.amax())):
        return -1
    if p.top_k <= 0 and p.top_p >= 1.0 and p.min_p <= 0.0 and p.typical_p >= 1.0:
        return filters.draw_unfiltered(logits.float().cpu().numpy(), p.temperature, _uniform(seq))
    values, ids = all_sorted(logits)
    rows = Candidates.of(values[None])
    for step in filters.FILTERS:
        step(rows, [p])
    return int(ids[filters.draw(rows, [p], np.array([_uniform(seq)]))[0]])


def logprobs(raw: Tensor, tokens: list[int], counts: list[int]) -> list[TokenLogprob]:
    """Natural log-probabilities under softmax of raw logits (n, V): of each row's token, and its `counts` likeliest.

    NaN for a row that is not finite.
    """
    totals = log_totals(raw)
    totals = np.where(np.isfinite(totals), totals, np.nan)
    index = torch.tensor(tokens, device=raw.device).clamp_(min=0).unsqueeze(1)
    chosen = raw.gather(1, index).double().cpu().numpy()[:, 0] - totals
    most = max(counts)
    values, ids = largest(raw, most) if most else (np.empty((len(tokens), 0), np.float32), np.empty((len(tokens), 0), np.int64))
    found = []
    for row, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        top = list(zip(ids[row, :count].tolist(), (values[row, :count] - totals[row]).tolist(), strict=True))
        found.append(TokenLogprob(token, float(chosen[row]), top))
    return found


def log_totals(logits: Tensor) -> NDArray[np.float64]:
    """log(sum(exp(row))) of rows (n, V). Row by row: torch's reduction of one row does not depend on the others then, and on
    a CPU that is also three times as fast at 262,144 columns."""
    totals = torch.cat([torch.logsumexp(row.unsqueeze(0), 1) for row in logits])
    found: NDArray[np.float64] = totals.double().cpu().numpy()
    return found


def _uniform(seq: Sequence) -> float:
    return filters.uniform(seq.seed, seq.num_generated)


def _ids(ids: NDArray[np.int64]) -> list[int]:
    found: list[int] = ids.tolist()
    return found
