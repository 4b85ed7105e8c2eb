"""Pooling: hidden states of one prompt, in the chunks in which they are computed, become one embedding vector."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ollamapy.engine.sequence import Pooling, Result, Sequence
from ollamapy.errors import failure_text

log = logging.getLogger(__name__)


def pooling_of(pooling_type: str, causal: bool) -> Pooling:
    """What a model's metadata asks for; where it says nothing of use, the last token if attention is causal, else the mean."""
    known: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "last": "last"}
    return known.get(pooling_type, "last" if causal else "mean")


def pool(seq: Sequence, rows: Tensor) -> None:
    """Takes the hidden states (n, E) of a chunk: those that `build.wanted_rows` chose. A mean is summed in float64, so that
    it does not show how the prompt was cut."""
    if not rows.shape[0]:
        return
    if seq.pooling == "mean":
        total = rows.sum(0, dtype=torch.float64)
        seq.pooled = total if seq.pooled is None else seq.pooled + total
    else:
        seq.pooled = rows[0].double()


def pooled_bytes(seq: Sequence) -> bytes:
    """The finished vector as little-endian float32. Raises ValueError when it has a NaN or an infinity."""
    assert seq.pooled is not None
    vector = seq.pooled / len(seq.token_ids) if seq.pooling == "mean" else seq.pooled
    if not bool(torch.isfinite(vector).all()):
        raise ValueError("the model's hidden states are not finite")
    return vector.float().cpu().numpy().astype("<f4").tobytes()


def pooled_result(seq: Sequence, length: int, rows: Tensor) -> Result | None:
    """Takes a chunk of `length` tokens; the vector when it was the last. Only a device that
    is lost raises: with anything else the step would be run again, and chunks of others taken twice."""
    try:
        pool(seq, rows)
        complete = seq.num_computed + length == len(seq.token_ids)
        return Result(vector=pooled_bytes(seq)) if complete else None
    except ValueError as error:
        return Result(error=str(error))
    except torch.AcceleratorError:
        raise
    except Exception as error:
        log.exception("pooling of request %d failed", seq.request_id)
        return Result(error=failure_text(error))
