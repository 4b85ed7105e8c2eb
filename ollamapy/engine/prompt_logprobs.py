"""Log-probabilities of a prompt's own tokens, chunk by chunk as it is computed. Knows no scheduling."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.sampler import NOT_FINITE, as_logprobs
from ollamapy.engine.sequence import Sequence

MAX_BYTES = 32 << 20  # of logits at a time: 163 rows of 49,152 tokens, 32 of 262,144


@torch.inference_mode()
def tell(seq: Sequence, hidden: Tensor, logits: Callable[[Tensor], Tensor], vocab_size: int) -> str:
    """Leaves in `seq.prompt_logprobs` those of the tokens after the next positions to be told, whose hidden states these are
    (n, E). What is wrong, "" when nothing is."""
    first = seq.num_told + 1
    seq.prompt_logprobs = []
    rows = max(MAX_BYTES // (4 * vocab_size), 1)
    for start in range(0, hidden.shape[0], rows):
        values = logits(hidden[start : start + rows]).float()
        tokens = seq.token_ids[first + start : first + start + len(values)].tolist()
        own = values.gather(1, torch.tensor(tokens, device=values.device).unsqueeze(1))[:, 0].double().cpu().numpy()
        counts = [seq.params.prompt_logprobs] * len(tokens)
        seq.prompt_logprobs += as_logprobs(tokens, own, ops.log_totals(values), *ops.largest(values, max(*counts, 1)), counts)
    bad = any(math.isnan(entry.logprob) for entry in seq.prompt_logprobs)
    return NOT_FINITE if bad else ""
