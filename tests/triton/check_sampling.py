"""Sampling kernels against the host's sampler and torch's ops on the device: the same tokens from the same logits, with the
same logprobs, after the same changes."""

from __future__ import annotations

import dataclasses
import math
import random
from array import array

import msgspec
import numpy as np
import pytest
import torch

from ollamapy import ops
from ollamapy.engine.device_sampler import DeviceSampler
from ollamapy.engine.editor import Editor
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sampler import Sampler
from ollamapy.engine.sequence import Sequence
from ollamapy.reference import device_sampling
from ollamapy.reference import sampling as host
from ollamapy.triton_kernels import edits as changes
from ollamapy.triton_kernels import sampling, tuning
from tests.engine.test_edits import awkward_logits, some_sequences

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


@pytest.mark.parametrize("count", [1, 5, 16, 20, 64, 100])
def test_told(count: int) -> None:
    """Of some rows of those drawn; the logarithm of the sum is off by what float32 rounds: exp by 2 of its last bits and by
    that of the difference, 512 of them are added in 9 steps, 12 with blocks of 4096, in all less than 2^-20."""
    logits = (3 * torch.randn(4, SIZE, generator=torch.Generator().manual_seed(1))).round()
    logits[1].clamp_(max=0.0)  # hundreds of equals, some of them -0
    logits[2, ::3] = -math.inf
    logits[3] = 80.0 * logits[3]  # one token has it all, and the sum would overflow
    rows, tokens = torch.tensor([6, 0, 2, 5]), torch.tensor([SIZE - 1, 9, 1, 9, 9, -1, 0])
    got, want = sampling.told(logits, rows, tokens, count), device_sampling.told(logits, rows, tokens, count)
    assert got.dtype == want.dtype == torch.float64
    assert torch.equal(got[:, 0], want[:, 0]) and torch.equal(got[:, 2:], want[:, 2:])
    torch.testing.assert_close(got[:, 1], want[:, 1], rtol=0, atol=2**-20)
    alone = sampling.told(logits[2:3], rows[2:3], tokens, count)
    assert torch.equal(alone, got[2:3])


def test_told_of_rows_that_are_not_finite() -> None:
    logits = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(2))
    logits[0, 5], logits[1, 600], logits[2] = math.nan, math.inf, -math.inf
    totals = sampling.told(logits, torch.arange(4), torch.tensor([5, 3, -1, 8]), 3)[:, 1]
    assert totals.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize(("count", "size"), [(1, 11), (9, SIZE), (33, 4097)])
def test_edits_are_the_host_s(count: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit. Lists longer than a block, lists that meet, empty ones, rows without any."""
    monkeypatch.setattr(changes, "EDITED", 16)
    rng = random.Random(3 * size)
    sequences, logits = some_sequences(rng, count, size), awkward_logits(rng, count, size)
    for seq in sequences:
        for _ in range(rng.choice([0, 0, 50])):
            if len(seq.token_ids) > 1:
                seq.accept(rng.randrange(size))  # more than a block of tokens
    edits = Editor().of(sequences, logits)
    assert edits is not None
    want = logits.clone()
    with np.errstate(all="ignore"):
        changes.edit(logits, edits)
    host.edit(want, edits)
    torch.testing.assert_close(logits, want, rtol=0, atol=0, equal_nan=True)


def test_edits_leave_other_memory_alone() -> None:
    """A token that the row has not, and rows that lie apart."""
    whole = torch.zeros(3, 64)
    tokens, logits = array("q", [3, 31, 33]), whole[:, :32]
    edits = Editor().of([Sequence(0, tokens, SamplingParams(presence_penalty=2.0), 99)] * 2, logits)
    assert edits is not None
    changes.edit(logits, edits)
    want = torch.zeros(3, 64)
    want[:2, [3, 31]] = -2.0
    assert torch.equal(whole, want)


@pytest.mark.parametrize("size", [1, 31, 32, 33, SIZE, 1024, 2100])
def test_masks_are_the_host_s(size: int) -> None:
    """Of some rows, which lie apart, by words of any, no and all bits; more words than logits. NaN stays where it may."""
    rng = np.random.default_rng(size)
    whole = torch.randn(5, size + 9, generator=torch.Generator().manual_seed(size))
    whole[3, : size // 2] = math.nan
    bits = rng.integers(-(2**31), 2**31, (3, -(-size // 32) + 1)).astype(np.int32)
    bits[rng.random(bits.shape) < 0.3] = 0
    bits[rng.random(bits.shape) < 0.3] = -1
    want = whole.clone()
    changes.forbid(whole[:, :size], [3, 0, 4], bits)
    host.forbid(want[:, :size], [3, 0, 4], bits)
    torch.testing.assert_close(whole, want, rtol=0, atol=0, equal_nan=True)


def test_a_step_is_the_host_s() -> None:
    """Through the samplers: changes, draws and logprobs of a batch, by these kernels and by the reference's on the host."""
    rng = random.Random(5)
    logits = 2 * torch.randn(12, SIZE, generator=torch.Generator().manual_seed(5))
    sequences = some_sequences(rng, 12, SIZE)
    for row, seq in enumerate(sequences):
        seq.params = msgspec.structs.replace(seq.params, logprobs=(-1, 0, 4)[row % 3], top_k=(40, 0)[row % 2], temperature=0.9)
    try:
        ops.choose(torch.device("cpu"), "triton")
        assert all(ops.chosen()[op] == "triton" for op in ("edit", "forbid", "draw_on_device", "tell_on_device"))
        got = DeviceSampler(Sampler(), lambda tensor: lambda: tensor).start(logits.clone(), sequences).results()
        ops.choose(torch.device("cpu"), "reference")
        want = Sampler().sample(logits.clone(), sequences)
    finally:
        ops.choose(torch.device("cpu"))
    for own, other in zip(got, want, strict=True):
        assert own.token_id == other.token_id >= 0
        if other.logprob is not None:
            assert own.logprob is not None and [t for t, _ in own.logprob.top] == [t for t, _ in other.logprob.top]
            near = (
                [own.logprob.logprob, *(p for _, p in own.logprob.top)],
                [other.logprob.logprob, *(p for _, p in other.logprob.top)],
            )
            assert np.allclose(*near, rtol=0, atol=2**-19)  # the host's sum is float32 too


def test_a_vocabulary_smaller_than_the_candidates() -> None:
    logits = torch.randn(4, 11, generator=torch.Generator().manual_seed(4))
    params, uniforms = [CASES[index] for index in (0, 2, 7, 13)], np.array([0.1, 0.9, 0.6, 0.4])
    want, _ = host.draw(logits, params, np.stack([uniforms, uniforms], 1))
    assert sampling.draw(logits, params, uniforms).tolist() == want.tolist()
    rows = torch.arange(4)
    assert torch.equal(sampling.told(logits, rows, rows, 11)[:, 13:], device_sampling.told(logits, rows, rows, 11)[:, 13:])
