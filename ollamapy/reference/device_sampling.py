"""One token of each row, drawn where the logits are, and what its logprobs are made of: nothing comes to the host. What
`sampling.draw` chooses, from torch's ops.

Candidates are ranked by keys of 64 bits, the logit's order above and the token id below, so that no device breaks a tie in its
own way; weights and their running sums are float64, as on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ollamapy.engine.filters import Floats
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.transfer import sent
from ollamapy.reference.sampling import LEVELS

ELEMENTS = 1 << 23  # logits looked at together: a row takes some ten arrays of 8 bytes each, 0.7 GB for 64 rows of 128k
_LOW = 0x7FFFFFFF
_ORDERED = -1  # an unfiltered row: its vocabulary in the order of ids


def ranked(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits (n, V) float32 of each row and their ids, the lower id first among equals; NaN is largest."""
    bits = (logits + 0.0).view(torch.int32)  # -0 is 0
    order = (bits ^ ((bits >> 31) & _LOW)).long()
    keys = (order << 32) | (_LOW - torch.arange(logits.shape[1], device=logits.device))
    best = keys.sort(dim=1, descending=True).values if count >= logits.shape[1] else keys.topk(count, dim=1).values
    bits = (best >> 32).int()
    return (bits ^ ((bits >> 31) & _LOW)).view(torch.float32), _LOW - (best & 0xFFFFFFFF)


def told(logits: Tensor, rows: Tensor, tokens: Tensor, count: int) -> Tensor:
    """(m, 2 + 2 count) float64 of the model's logits (m, V) float32, those of `rows` (m,) of `tokens` (n,): the token's logit,
    the logarithm of the sum of exp(logits), the `count` <= V likeliest logits and their ids. The sum is not finite, or the
    likeliest, where a row's largest is not."""
    values, ids = ranked(logits, count)
    own = logits.gather(1, tokens[rows].clamp(min=0).unsqueeze(1))
    totals = logits.double().logsumexp(1, keepdim=True)
    return torch.cat((own.double(), totals, values.double(), ids.double()), 1)


def cuts_of(params: Sequence[SamplingParams], uniforms: Floats, device: torch.device) -> Tensor:
    """(n, 5) float64 on the device: temperature, top_k, top_p, min_p, uniform."""
    values = [(p.temperature, p.top_k, p.top_p, p.min_p, own) for p, own in zip(params, uniforms.tolist(), strict=True)]
    return sent(torch.tensor(values, dtype=torch.float64), device)


def draw(logits: Tensor, params: Sequence[SamplingParams], uniforms: Floats) -> Tensor:
    """Ids (n,) int64 of rows (n, V) float32, -1 where the largest logit is NaN or infinite; uniforms (n,) in [0, 1).

    For rows without typical_p, XTC and mirostat.
    """
    vocab_size, device = logits.shape[1], logits.device
    groups: dict[int, list[int]] = {}
    for row, p in enumerate(params):
        groups.setdefault(_count(p, vocab_size), []).append(row)
    heads = sorted(count for count in groups if 0 < count < vocab_size)
    for count in heads[:-1]:  # one pass with the most candidates serves all
        groups[heads[-1]] += groups.pop(count)
    cuts = cuts_of(params, uniforms, device)
    most = max(ELEMENTS // vocab_size, 1)
    if len(groups) == 1 and len(params) <= most:
        return _drawn(logits, cuts, *groups)
    tokens = torch.empty(len(params), dtype=torch.int64, device=device)
    for count, rows in groups.items():
        where = sent(torch.tensor(rows), device)
        for index in torch.split(where, most):
            tokens[index] = _drawn(logits[index], cuts[index], count)
    return tokens


def _count(p: SamplingParams, vocab_size: int) -> int:
    """Candidates that decide a row for certain, without a look at them."""
    if p.temperature <= 0.0:
        return 1
    if 0 < p.top_k < vocab_size:
        return min(next((level for level in LEVELS if p.top_k <= level), vocab_size), vocab_size)
    return vocab_size if p.top_p < 1.0 or p.min_p > 0.0 else _ORDERED


def _drawn(logits: Tensor, cuts: Tensor, count: int) -> Tensor:
    if count == _ORDERED:
        return _unfiltered(logits, cuts[:, 0], cuts[:, 4])
    values, ids = ranked(logits, count)
    temperature, top_k, top_p, min_p, uniform = (column.unsqueeze(1) for column in cuts.unbind(1))
    finite = values[:, :1].isfinite()
    scores = torch.where(finite, values, 0.0).double()
    below = scores - scores[:, :1]
    place = torch.arange(count if count < logits.shape[1] else logits.shape[1], device=logits.device)
    kept = (place < top_k) | (top_k <= 0.0)
    weights = torch.where(kept, below.exp(), 0.0)
    running = weights.cumsum(1)
    before = torch.cat((torch.zeros_like(uniform), running[:, :-1]), 1)
    kept = kept & ((before < top_p * running[:, -1:]) | (before == 0.0) | (top_p >= 1.0))
    weights = torch.where(kept, weights, 0.0)
    kept = kept & ((weights >= min_p.clamp(max=1.0) * weights.amax(1, keepdim=True)) | (min_p <= 0.0))
    shares = torch.where(kept, (below / torch.where(temperature > 0.0, temperature, 1.0)).exp(), 0.0)
    running = shares.cumsum(1)
    chosen = (running <= uniform * running[:, -1:]).sum(1, keepdim=True)
    last = torch.where(shares > 0.0, place, 0).amax(1, keepdim=True)  # u * total may round up to total
    picked = torch.where(temperature > 0.0, torch.minimum(chosen, last), 0)
    return torch.where(finite, ids.gather(1, picked), -1).squeeze(1)


def _unfiltered(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    best = logits.amax(1, keepdim=True)
    values = torch.where(best.isfinite(), logits, 0.0).double()
    shares = ((values - values.amax(1, keepdim=True)) / temperature.unsqueeze(1)).exp()
    running = shares.cumsum(1)
    chosen = (running <= uniform.unsqueeze(1) * running[:, -1:]).sum(1, keepdim=True)
    place = torch.arange(logits.shape[1], device=logits.device)
    last = torch.where(shares > 0.0, place, 0).amax(1, keepdim=True)
    return torch.where(best.isfinite(), torch.minimum(chosen, last), -1).squeeze(1)
