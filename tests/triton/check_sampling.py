"""Sampling kernels, interpreted, against the sampler's own filters on the host and against exact probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sampler import penalize as host_penalize
from ollamapy.reference import sampling as host
from ollamapy.triton_kernels import sampling

SIZE = 700  # logits: more than a block of 256
CASES = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.0),
    SamplingParams(temperature=1.5, top_k=3, top_p=1.0, min_p=0.0),
    SamplingParams(temperature=0.7, top_k=64, top_p=1.0, min_p=0.1),
    SamplingParams(temperature=3.0, top_k=0, top_p=0.5, min_p=0.0),
    SamplingParams(temperature=1.0, top_k=0, top_p=0.9, min_p=0.05),
    *[SamplingParams(temperature=99.0, top_k=40, top_p=0.9)] * 3,  # nearly uniform: one token more or less moves the draw
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 256)


def choices(params: list[SamplingParams], seed: int = 1, step: int = 0) -> sampling.Choices:
    rows = len(params)
    return sampling.Choices(
        torch.tensor([p.temperature for p in params]),
        torch.tensor([p.top_k for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params]),
        torch.tensor([p.min_p for p in params]),
        torch.arange(seed, seed + rows),
        torch.full((rows,), step, dtype=torch.int32),
    )


def on_the_host(logits: torch.Tensor, params: list[SamplingParams], uniforms: np.ndarray) -> list[int]:
    """What the sampler would choose with these uniform numbers; equal logits by their ids."""
    ids, _ = host.draw(logits, params, np.stack([uniforms, uniforms], 1))
    found: list[int] = ids.tolist()
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_filters(ties: bool) -> None:
    """The host's token for the same uniform number."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(len(CASES), SIZE, generator=generator)
    if ties:
        logits = logits.round()  # dozens of equal logits at the edges of the filters
    for step in range(1 + ties):
        asked = choices(CASES, step=step)
        uniforms = sampling.uniforms(asked)
        assert ((uniforms >= 0) & (uniforms < 1)).all() and len(set(uniforms.tolist())) == len(CASES)
        tokens, beyond = sampling.filtered(logits, asked, 256)
        want = on_the_host(logits, CASES, uniforms.double().numpy())
        decided = [row for row in range(len(CASES)) if not beyond[row]]
        assert decided[:5] == [0, 1, 2, 3, 4]  # with top_k, or greedy, nothing is ever beyond
        assert [tokens.tolist()[row] for row in decided] == [want[row] for row in decided]


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = 2 * torch.randn(3, SIZE, generator=torch.Generator().manual_seed(3))
    asked = choices(CASES[2:5])
    together = sampling.filtered(logits, asked, 256)[0]
    for row in range(3):
        alone = sampling.Choices(*(part[row : row + 1] for part in asked))
        assert sampling.filtered(logits[row : row + 1], alone, 256)[0][0] == together[row]


def test_beyond_the_candidates() -> None:
    """A flat row's top-p reaches further than the candidates, and the host is told; not if the candidates are all there is."""
    asked = choices([SamplingParams(temperature=1.0, top_k=0, top_p=0.9), SamplingParams(temperature=1.0, top_k=0, top_p=0.1)])
    flat = torch.zeros(2, SIZE)
    assert sampling.filtered(flat, asked, 256)[1].tolist() == [1, 0]
    assert sampling.filtered(flat[:, :100].contiguous(), asked, 256)[1].tolist() == [0, 0]


def test_rows_that_are_not_finite() -> None:
    rows = torch.zeros(3, SIZE)
    rows[0, 5], rows[1, 5], rows[2, :] = math.nan, math.inf, -math.inf
    with np.errstate(invalid="ignore"):
        assert sampling.draw(rows, choices([SamplingParams(temperature=0.0)] * 3)).tolist() == [-1, -1, -1]


def test_greedy_and_gumbel() -> None:
    """Greedy takes the lowest of equals; draws follow the probabilities (chi-square, one in 10^6 would fail)."""
    row = torch.tensor([0.0, 2.0, 1.0, 2.0, -3.0])
    assert sampling.draw(row[None], choices([SamplingParams(temperature=0.0)])).tolist() == [1]
    trials = 150
    drawn = sampling.draw(row.repeat(trials, 1), choices([SamplingParams(temperature=2.0)] * trials))
    expected = (row / 2).softmax(0) * trials
    observed = torch.bincount(drawn.long(), minlength=5).float()
    assert float(((observed - expected) ** 2 / expected).sum()) < 33.4
    later = sampling.draw(row.repeat(20, 1), choices([SamplingParams(temperature=2.0)] * 20, step=1))
    assert not torch.equal(drawn[:20], later)


def test_logprobs() -> None:
    logits = 20 * torch.randn(3, SIZE, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([4, 699, 0], dtype=torch.int32)
    chosen, totals = sampling.logprobs(logits, tokens)
    want = logits.double().log_softmax(1).gather(1, tokens.long().unsqueeze(1))[:, 0]
    torch.testing.assert_close(chosen.double(), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(totals.double(), logits.double().logsumexp(1), rtol=2e-6, atol=2e-6)


def test_penalties() -> None:
    class Row:
        def __init__(self, counts: dict[int, int], params: SamplingParams) -> None:
            self.params = params
            self.penalties = type("Counts", (), {"counts": counts})()

    rows = [
        Row({3: 2, 600: 1}, SamplingParams(repeat_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.25)),
        Row({5: 4}, SamplingParams(repeat_penalty=1.0, frequency_penalty=0.0, presence_penalty=-0.5)),
    ]
    logits = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(2))
    want = logits.clone()
    host_penalize(want, rows)
    factors = [(r.params.repeat_penalty, r.params.frequency_penalty, r.params.presence_penalty) for r in rows]
    sampling.penalize(
        logits, torch.tensor([0, 0, 1]), torch.tensor([3, 600, 5]), torch.tensor([2.0, 1.0, 4.0]), torch.tensor(factors)
    )
    torch.testing.assert_close(logits, want, rtol=1e-6, atol=1e-7)
