"""Samples where the logits are: token ids stay on the device for the next step, and one copy tells the host what was drawn.

What it draws is what `Sampler` draws from the same logits. Knows no scheduling and no text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as ListLike

import numpy as np
import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine import filters, mirostat
from ollamapy.engine.sampler import NOT_FINITE, Sampler, as_logprobs, failure
from ollamapy.engine.sequence import Result, Sequence
from ollamapy.engine.transfer import sent

Fetch = Callable[[Tensor], Callable[[], Tensor]]
"""Starts a copy to the host; what it returns waits for that."""


def drawable(sequences: ListLike[Sequence]) -> bool:
    """Whether all of them can be drawn on the device: typical_p, XTC and mirostat are the host's."""
    params = [seq.params for seq in sequences]
    return not any(p.typical_p < 1.0 or p.xtc_probability > 0.0 or mirostat.is_on(p) for p in params)


class Drawn:
    """Tokens of one step: (n,) int64 on the device, -1 for a row that failed."""

    def __init__(self, tokens: Tensor, sequences: ListLike[Sequence], told: Tensor | None, fetch: Fetch) -> None:
        """`told` (m, 2 + 2 K) float64 of the rows that ask for logprobs: raw logit, log-sum, likeliest values and ids."""
        self.tokens, self._sequences = tokens, sequences
        self._width = 0 if told is None else told.shape[1]
        self._get = fetch(tokens if told is None else torch.cat((tokens, told.view(torch.int64).flatten())))

    def results(self) -> list[Result]:
        """Waits for them."""
        found = self._get().numpy()
        count = len(self._sequences)
        tokens = found[:count].tolist()
        results = [Result(t) if t >= 0 else failure(seq) for t, seq in zip(tokens, self._sequences, strict=True)]
        if self._width:
            rows = [row for row, seq in enumerate(self._sequences) if seq.params.logprobs >= 0]
            told = found[count:].view(np.float64).reshape(len(rows), self._width)
            values, ids = np.split(told[:, 2:], 2, axis=1)
            counts = [self._sequences[row].params.logprobs for row in rows]
            logprobs = as_logprobs(
                [tokens[row] for row in rows], told[:, 0], told[:, 1], values.astype(np.float32), ids.astype(np.int64), counts
            )
            for row, logprob in zip(rows, logprobs, strict=True):
                if tokens[row] >= 0:
                    finite = math.isfinite(logprob.logprob)
                    results[row] = Result(tokens[row], logprob) if finite else Result(error=NOT_FINITE)
        return results


class DeviceSampler:
    """Samples batches of rows by the steps of a `Sampler`. `fetch` copies to the host."""

    def __init__(self, sampler: Sampler, fetch: Fetch) -> None:
        self._sampler, self._fetch = sampler, fetch

    @torch.inference_mode()
    def start(self, logits: Tensor, sequences: ListLike[Sequence], ahead: int = 0) -> Drawn:
        """Draws from logits (n, V) float32, which are overwritten. `ahead`: tokens of each sequence that are not known yet."""
        asked = [row for row, seq in enumerate(sequences) if seq.params.logprobs >= 0]
        rows = sent(torch.tensor(asked), logits.device) if asked else None
        raw = None if rows is None else logits[rows]  # a copy
        self._sampler.prepare(logits, sequences)
        uniforms = np.array([filters.uniform(seq.seed, seq.num_generated + ahead) for seq in sequences])
        tokens = ops.draw_on_device(logits, [seq.params for seq in sequences], uniforms)
        told = None
        if rows is not None and raw is not None:
            count = min(max(1, *(sequences[row].params.logprobs for row in asked)), logits.shape[1])
            told = ops.tell_on_device(raw, rows, tokens, count)
        return Drawn(tokens, sequences, told, self._fetch)
