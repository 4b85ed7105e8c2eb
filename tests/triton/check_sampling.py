"""Sampling kernels against the host's sampler and torch's ops on the device: the same tokens from the same logits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ollamapy.engine.protocol import SamplingParams
from ollamapy.reference import device_sampling
from ollamapy.reference import sampling as host
from ollamapy.triton_kernels import sampling, tuning

SIZE = 700  # logits: more than a block of 512
CASES = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=-1.0, top_k=1, top_p=0.0),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.0),
    SamplingParams(temperature=1.5, top_k=16, top_p=1.0, min_p=0.0),
    SamplingParams(temperature=0.7, top_k=64, top_p=1.0, min_p=0.1),
    SamplingParams(temperature=1.0, top_k=17, top_p=1e-9, min_p=2.0),
    SamplingParams(temperature=99.0, top_k=40, top_p=0.9),  # nearly uniform: one token more or less moves the draw
    SamplingParams(temperature=3.0, top_k=0, top_p=0.5, min_p=0.0),
    SamplingParams(temperature=1.0, top_k=-1, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=1.0, top_k=SIZE + 1, top_p=1.0, min_p=0.01),
    SamplingParams(temperature=99.0, top_k=300, top_p=0.97),
    SamplingParams(temperature=0.8, top_k=300, top_p=0.0, min_p=0.0),
    SamplingParams(temperature=1e-6, top_k=0, top_p=1.0),
    SamplingParams(temperature=0.9, top_k=0, top_p=1.0, min_p=-0.1),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and rows whose filters reach beyond the candidates."""
    table = dataclasses.replace(tuning.of(torch.device("cpu")), draw_logits=512)
    monkeypatch.setattr(tuning, "of", lambda device: table)
    monkeypatch.setattr(sampling, "BLOCK", 512)
    monkeypatch.setattr(sampling, "FEW", 16)
    monkeypatch.setattr(sampling, "CANDIDATES", 64)


@pytest.mark.parametrize("kind", ["random", "ties", "flat"])
def test_same_choice_as_on_the_host(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(len(CASES), SIZE, generator=generator)
    if kind == "ties":
        logits = logits.round()  # dozens of equals at the edges of the filters
        logits[:, 1::7] = -math.inf  # as grammars leave them
    elif kind == "flat":  # every row without top_k reaches beyond the candidates
        logits = torch.zeros(len(CASES), SIZE)
        logits[::2, ::2] = -0.0  # which is equal to 0, and must not be ranked below it
    uniforms = torch.rand(len(CASES), generator=generator, dtype=torch.float64).numpy()
    uniforms[3], uniforms[7], uniforms[10], uniforms[13] = 1 - 2**-53, 0.0, 1 - 2**-53, 1 - 2**-53
    rows = [2, 3, 7, 10, 13] if kind == "flat" else range(len(CASES))
    logits, uniforms, params = logits[list(rows)], uniforms[list(rows)], [CASES[row] for row in rows]
    want, _ = host.draw(logits, params, np.stack([uniforms, uniforms], 1))
    got = sampling.draw(logits, params, uniforms)
    assert got.tolist() == want.tolist()
    assert got.tolist() == device_sampling.draw(logits, params, uniforms).tolist()


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = 2 * torch.randn(3, SIZE, generator=torch.Generator().manual_seed(3))
    uniforms = np.array([0.3, 0.5, 0.7])
    together = sampling.draw(logits, CASES[2:5], uniforms)
    for row in range(3):
        alone = sampling.draw(logits[row : row + 1], CASES[2 + row : 3 + row], uniforms[row : row + 1])
        assert alone.tolist() == together[row : row + 1].tolist()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, None])
def test_rows_that_are_not_finite(bad: float | None) -> None:
    """-1 for them alone: greedy, filtered and unfiltered; with None nothing is likely at all."""
    params = [CASES[0], CASES[2], CASES[8], CASES[13]]
    logits = torch.zeros(5, SIZE)
    for row in range(4):
        if bad is None:
            logits[row] = -math.inf
        else:
            logits[row, 300 + row] = torch.tensor(bad).copysign(torch.tensor(bad))
    with np.errstate(invalid="ignore"):
        found = sampling.draw(logits, [*params, CASES[0]], np.full(5, 0.5)).tolist()
    assert found == [-1, -1, -1, -1, 0]


@pytest.mark.parametrize("count", [1, 5, 16, 20, 64, 100, SIZE])
def test_ranked(count: int) -> None:
    logits = (3 * torch.randn(2, SIZE, generator=torch.Generator().manual_seed(1))).round()
    logits[1].clamp_(max=0.0)  # hundreds of equals, some of them -0
    values, ids = sampling.ranked(logits, count)
    want_values, want_ids = device_sampling.ranked(logits, count)
    assert torch.equal(ids, want_ids) and torch.equal(values, want_values)


def test_a_vocabulary_smaller_than_the_candidates() -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(4))
    params, uniforms = [CASES[index] for index in (0, 2, 7, 13)], np.array([0.1, 0.9, 0.6, 0.4])
    want, _ = host.draw(logits, params, np.stack([uniforms, uniforms], 1))
    assert sampling.draw(logits, params, uniforms).tolist() == want.tolist()
    assert sampling.ranked(logits, 11)[1].tolist() == device_sampling.ranked(logits, 11)[1].tolist()
