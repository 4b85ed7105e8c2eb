"""Sampling on the device, by torch's ops on CPU tensors, against the host's sampler: the same choice from the same logits."""

from __future__ import annotations

import math
import random
from array import array

import numpy as np
import pytest
import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.device_sampler import DeviceSampler, drawable
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sampler import NOT_FINITE, Sampler
from ollamapy.engine.sequence import Result, Sequence
from ollamapy.reference import device_sampling

VOCAB = 1500


@pytest.fixture(autouse=True, params=["reference", "csrc"])
def _family(request: pytest.FixtureRequest) -> None:
    """Of the host's sampler; the device's is the same beside both."""
    ops.choose(torch.device("cpu"), str(request.param))


def sequence(params: dict[str, object], seed: int = 0, generated: int = 0) -> Sequence:
    seq = Sequence(0, array("q", [3, 5, 3]), SamplingParams(**params), 4096, seed)  # type: ignore[arg-type]
    seq.num_generated = generated
    return seq


def both(logits: Tensor, sequences: list[Sequence]) -> tuple[list[Result], list[Result]]:
    sampler, copies = Sampler(), []

    def fetch(tensor: Tensor):  # type: ignore[no-untyped-def]
        copies.append(tensor)
        return lambda: tensor

    drawn = DeviceSampler(sampler, fetch).start(logits.clone(), sequences)
    got = drawn.results()
    assert len(copies) == 1, "one copy per step"
    assert [max(r.token_id, -1) for r in got] == drawn.tokens.tolist()
    return got, sampler.sample(logits.clone(), sequences)


def random_params(rng: random.Random) -> dict[str, object]:
    return {
        "temperature": rng.choice([0.0, -1.0, 1e-6, 0.3, 0.8, 1.0, 3.0]),
        "top_k": rng.choice([0, -1, 1, 2, 40, 64, 65, 300, 1024, 1025, VOCAB, VOCAB + 1]),
        "top_p": rng.choice([0.0, 1e-9, 0.5, 0.9, 1.0, 1.5]),
        "min_p": rng.choice([0.0, -0.1, 0.05, 0.5, 1.0, 2.0]),
        "repeat_penalty": rng.choice([1.0, 1.3, 0.7]),
        "frequency_penalty": rng.choice([0.0, 0.5]),
        "presence_penalty": rng.choice([0.0, 0.5]),
        "suppress_ids": rng.choice([(), (1, 2, 9999)]),
        "logit_bias": rng.choice([(), ((4, 3.0), (7, -100.0))]),
        "dry_multiplier": rng.choice([0.0, 0.0, 0.8]),
        "logprobs": rng.choice([-1, -1, 0, 3]),
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["random", "ties", "flat"])
def test_same_choice_as_on_the_host(seed: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    if seed % 2:
        monkeypatch.setattr(device_sampling, "ELEMENTS", 7 * VOCAB)  # seven rows at a time
    torch.manual_seed(seed)
    logits = torch.randn(40, VOCAB) * rng.choice([0.1, 1.0, 6.0])
    if kind == "ties":
        logits = logits.round()  # hundreds of equals; the last of the candidates is one of them, mostly
    elif kind == "flat":
        logits = torch.zeros(40, VOCAB)
        logits[::2, ::2] = -0.0  # which is equal to 0, and must not be ranked below it
    sequences = [sequence(random_params(rng), rng.randrange(1 << 62), rng.randrange(500)) for _ in range(40)]
    got, want = both(logits, sequences)
    for own, other in zip(got, want, strict=True):
        assert own.token_id == other.token_id
        assert (own.logprob is None) == (other.logprob is None)
        if own.logprob is not None and other.logprob is not None:
            assert own.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-5)
            assert [token for token, _ in own.logprob.top] == [token for token, _ in other.logprob.top]
            assert np.allclose([p for _, p in own.logprob.top], [p for _, p in other.logprob.top], atol=1e-5)


def test_a_row_does_not_see_the_others() -> None:
    rng = random.Random(7)
    logits = torch.randn(24, VOCAB)
    sequences = [sequence(random_params(rng), seed) for seed in range(24)]
    together, _ = both(logits, sequences)
    for row, seq in enumerate(sequences):
        alone, _ = both(logits[row : row + 1], [seq])
        assert alone[0] == together[row]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 0.8}, {"top_k": 0, "top_p": 1.0}, {"top_k": 0}])
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: dict[str, object]) -> None:
    logits = torch.randn(3, VOCAB)
    logits[1, 77] = bad
    got, want = both(logits, [sequence({**params, "logprobs": 1}) for _ in range(3)])
    assert got[1].error == want[1].error == NOT_FINITE
    assert [got[0].token_id, got[2].token_id] == [want[0].token_id, want[2].token_id]
    assert both(torch.full((1, VOCAB), -math.inf), [sequence(params)])[0][0].error == NOT_FINITE


def test_what_is_left_to_the_host() -> None:
    assert drawable([sequence({}), sequence({"temperature": 0.0})])
    for params in ({"typical_p": 0.9}, {"xtc_probability": 0.5}, {"mirostat": 2}):
        assert not drawable([sequence({}), sequence(params)])
