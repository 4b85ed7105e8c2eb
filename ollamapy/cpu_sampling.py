"""Sampling's ops on the C++ kernels (csrc/cpu/sampling.cpp), in the form of `reference.sampling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ollamapy import extension
from ollamapy.engine.filters import Floats, Ids
from ollamapy.engine.protocol import SamplingParams
from ollamapy.reference import sampling


def _kernels() -> Any:
    return extension.load()


def largest(logits: Tensor, count: int) -> tuple[NDArray[np.float32], Ids]:
    """The `count` > 0 largest logits (n, V) of each row and their ids, both (n, min(count, V)). NaN for a row with a NaN or a
    positive infinity."""
    values, ids = _kernels().largest(logits.float(), count)
    return values.numpy(), ids.numpy()


def log_totals(logits: Tensor) -> Floats:
    """log(sum(exp(row))) of rows (n, V), in double; NaN for a row with a NaN or a positive infinity."""
    totals: Floats = _kernels().log_totals(logits.float()).numpy()
    return totals


def forbid(logits: Tensor, rows: Sequence[int], bits: NDArray[np.int32]) -> None:
    """As `reference.sampling.forbid`."""
    _kernels().forbid(logits, torch.tensor(rows, dtype=torch.int64), torch.from_numpy(bits))


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Floats) -> tuple[Ids, Floats]:
    """As `reference.sampling.draw`. Rows with typical_p or XTC, which keep no head of the ranking, go there."""
    ranked = [p.typical_p >= 1.0 and p.xtc_probability <= 0.0 for p in params]
    if not all(ranked):
        return _mixed(logits, params, uniforms, np.array(ranked))
    cuts = np.array([(p.temperature, p.top_k, p.top_p, p.min_p, 0.0) for p in params])
    cuts[:, 4] = uniforms[:, 0]
    ids, probabilities = _kernels().draw(logits.float(), torch.from_numpy(cuts))
    return ids.numpy(), probabilities.numpy()


def _mixed(logits: Tensor, params: Sequence[SamplingParams], uniforms: Floats, ranked: NDArray[np.bool_]) -> tuple[Ids, Floats]:
    tokens, probabilities = np.empty(len(params), dtype=np.int64), np.empty(len(params))
    for kind, function in ((True, draw), (False, sampling.draw)):
        rows = np.flatnonzero(ranked == kind)
        some = [p for p, own in zip(params, ranked, strict=True) if own == kind]
        if len(rows):
            tokens[rows], probabilities[rows] = function(logits[torch.from_numpy(rows)], some, uniforms[rows])
    return tokens, probabilities
