"""Sampler: from raw logits to one token per row. Knows no scheduling and no text.

The steps are llama.cpp's (`protocol.SamplingParams` has their order); filters, temperature and draw are the op `draw`. What is
drawn depends on the row's logits, its request's parameters, grammar, seed and number of generated tokens, and on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ListLike

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ollamapy import ops
from ollamapy.engine import filters, mirostat
from ollamapy.engine.editor import Editor
from ollamapy.engine.filters import Floats, Ids
from ollamapy.engine.grammar import Grammar
from ollamapy.engine.protocol import TokenLogprob
from ollamapy.engine.sequence import Result, Sequence

NOT_FINITE = "the model's logits are not finite"


class Sampler:
    """Samples batches of rows; holds nothing but the ids that its `Editor` has sent to the device."""

    def __init__(self) -> None:
        self._editor = Editor()

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: ListLike[Sequence]) -> list[Result]:
        """One result per row of logits (n, V) float32, which are overwritten. Raises what torch raises."""
        asked = [row for row, seq in enumerate(sequences) if seq.params.logprobs >= 0]
        told = LogprobsOf(logits, asked, sequences) if asked else None
        self.prepare(logits, sequences)
        tokens = choose(logits, sequences)
        results = [Result(token) if token >= 0 else failure(seq) for token, seq in zip(tokens, sequences, strict=True)]
        if told is not None:
            for row, logprob in zip(asked, told.chosen(logits, tokens), strict=True):
                if tokens[row] >= 0:
                    finite = math.isfinite(logprob.logprob)
                    results[row] = Result(tokens[row], logprob) if finite else Result(error=NOT_FINITE)
        return results

    def prepare(self, logits: Tensor, sequences: ListLike[Sequence]) -> None:
        """Does to logits (n, V) what comes before the filters. Waits for no device."""
        edits = self._editor.of(sequences, logits)
        if edits is not None:
            ops.edit(logits, edits)
        constrain(logits, [seq.grammar for seq in sequences])


def constrain(logits: Tensor, grammars: ListLike[Grammar | None]) -> None:
    """Puts minus infinity where a row's grammar forbids the token; logits (n, V) float32, None: a row without a grammar.

    On a GPU the masks are made while the forward pass still runs: nothing here waits for it.
    """
    held = [(row, grammar) for row, grammar in enumerate(grammars) if grammar is not None and not grammar.sleeps]
    if not held:
        return
    size = logits.shape[1]  # a model may have rows without a token, or tokens without a row
    width = max(math.ceil(size / 32), *(grammar.num_words for _, grammar in held))
    bits = np.zeros((len(held), width), dtype=np.int32)
    for own, (_, grammar) in zip(bits, held, strict=True):
        grammar.allowed(own[: grammar.num_words])
    ops.forbid(logits, [row for row, _ in held], bits)


def failure(seq: Sequence) -> Result:
    """A row without a largest logit: the model's fault, or that of a grammar that allows no token."""
    return Result(error=(seq.grammar.error if seq.grammar is not None else "") or NOT_FINITE)


def choose(logits: Tensor, sequences: ListLike[Sequence]) -> list[int]:
    """Token id of each row; -1 where its largest logit is NaN or infinite."""
    params = mirostat.bound(logits, sequences)
    uniforms = np.array([(_uniform(seq), _uniform(seq, 1) if seq.params.xtc_probability > 0.0 else 1.0) for seq in sequences])
    tokens, probabilities = ops.draw(logits, params, uniforms)
    mirostat.learn(sequences, probabilities)
    found: list[int] = tokens.tolist()
    return found


class LogprobsOf:
    """Natural log-probabilities under softmax of the model's logits, before anything is done to them: of `rows` of (n, V).

    Only rows whose values change are copied: a mask takes no token that is chosen later.
    """

    def __init__(self, logits: Tensor, rows: list[int], sequences: ListLike[Sequence]) -> None:
        params = [sequences[row].params for row in rows]
        raw = logits if len(rows) == logits.shape[0] else logits[rows]
        self._rows, self._counts = rows, [p.logprobs for p in params]
        self._totals = ops.log_totals(raw)
        self._values, self._ids = ops.largest(raw, max(*self._counts, 1))
        self._kept = {
            row: logits[row].clone()
            for row, p in zip(rows, params, strict=True)
            if p.logit_bias or p.dry_multiplier or mirostat.is_on(p) or sequences[row].penalties is not None
        }

    def chosen(self, logits: Tensor, tokens: list[int]) -> list[TokenLogprob]:
        """Of the token chosen in each row, and of the row's likeliest; NaN for a row that is not finite."""
        raw = np.array([float(self._kept.get(row, logits[row])[max(tokens[row], 0)]) for row in self._rows])
        own = [tokens[row] for row in self._rows]
        return as_logprobs(own, raw, self._totals, self._values, self._ids, self._counts)


def as_logprobs(
    tokens: ListLike[int], raw: Floats, totals: Floats, values: NDArray[np.float32], ids: Ids, counts: ListLike[int]
) -> list[TokenLogprob]:
    """Of rows with the logits `raw` of `tokens`, log-sums `totals` and likeliest `values` of `ids`; `counts` of these each."""
    totals = np.where(np.isfinite(totals), totals, np.nan)
    chosen, likeliest = (raw - totals).tolist(), (values - totals[:, None]).tolist()
    return [
        TokenLogprob(token, own, list(zip(some[:count], values[:count], strict=True)))
        for token, own, some, values, count in zip(tokens, chosen, ids.tolist(), likeliest, counts, strict=True)
    ]


def _uniform(seq: Sequence, stream: int = 0) -> float:
    return filters.uniform(seq.seed, seq.num_generated, stream)
