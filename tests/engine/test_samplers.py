"""Mirostat, DRY, XTC and logit bias against their definitions; and every sampler among batch mates."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ollamapy.engine import dry, filters, mirostat
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sampler import Sampler
from ollamapy.engine.sequence import Result, Sequence

Row = NDArray[np.float32]
OPEN = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}  # no filter


def sequence(tokens: list[int] | None = None, generated: int = 0, **params: Any) -> Sequence:
    seq = Sequence(0, array("q", tokens or [0]), SamplingParams(**params), context_length=4096, seed=params.get("seed", 0))
    seq.num_generated = generated
    seq.mu = [seq.mu[0]] * (generated + 1)
    return seq


def sample(rows: list[Row], sequences: list[Sequence]) -> list[Result]:
    return Sampler().sample(torch.from_numpy(np.stack(rows)), sequences)


def zipf_row(size: int, exponent: float, seed: int) -> Row:
    """Logits of a power law, in a random order."""
    return np.random.default_rng(seed).permutation(-exponent * np.log(np.arange(1, size + 1))).astype(np.float32)


# --- mirostat -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [2.0, 4.0])
def test_mirostat_converges_to_tau(version: int, tau: float) -> None:
    """400 tokens from power laws of several slopes, all of more entropy than tau: the mean surprise of the last 300 is tau."""
    seq = sequence(mirostat=version, mirostat_tau=tau, mirostat_eta=0.1, seed=5, temperature=1.0)
    assert seq.mu == [2.0 * tau]
    sampler, surprises = Sampler(), []
    for step in range(400):
        row = zipf_row(5000, 1.0 + 0.1 * (step % 3), step)
        before = seq.mu[-1]
        result = sampler.sample(torch.from_numpy(row[None].copy()), [seq])[0]
        assert result.token_id >= 0 and len(seq.mu) == step + 2
        surprises.append((before - seq.mu[-1]) / 0.1 + tau)
        seq.num_generated += 1
    # mu moves by eta times each error, so their sum is (mu's first - mu's last) / eta: exact, whatever the tokens were
    assert sum(surprises) - 400 * tau == pytest.approx((seq.mu[0] - seq.mu[-1]) / 0.1, abs=1e-6)
    assert abs(float(np.mean(surprises[100:])) - tau) < 0.15 * tau


def test_mirostat_2_keeps_what_is_below_mu() -> None:
    """-log2 p <= mu, at least the likeliest; the temperature comes first."""
    row = zipf_row(3000, 1.2, 1)
    probability = np.exp(row.astype(np.float64) / 0.7)
    probability /= probability.sum()
    for mu in (0.5, 3.0, 6.0, 9.0):
        seen = set()
        for seed in range(300):
            seq = sequence(mirostat=2, seed=seed, temperature=0.7)
            seq.mu = [mu]
            seen.add(sample([row.copy()], [seq])[0].token_id)
        kept = set(np.flatnonzero(-np.log2(probability) <= mu).tolist()) or {int(row.argmax())}
        assert seen <= kept and (mu > 3.0 or seen == kept), mu  # above, the least likely are too rare for 300 draws


def test_mirostat_1_fits_the_power_law() -> None:
    """For an exact law with exponent s over n tokens the estimate is s, so k is the paper's formula of it."""
    exponent, size, mu = 1.3, 4000, 6.0
    logits = -exponent * np.log(np.arange(1, mirostat.NUM_ESTIMATED + 1))
    excess = exponent - 1.0
    wanted = (excess * 2.0**mu / (1.0 - size**-excess)) ** (1.0 / exponent)
    assert mirostat.num_kept(logits, mu, size) == int(wanted)
    assert mirostat.num_kept(logits, 1000.0, size) == size
    assert mirostat.num_kept(logits[:1], mu, size) == 1
    assert mirostat.num_kept(np.zeros(100), mu, size) in range(1, size + 1)


def test_mirostat_is_off_when_greedy_and_repeats_a_step() -> None:
    row = zipf_row(500, 1.0, 3)
    greedy = sequence(mirostat=2, temperature=0.0)
    assert sample([row.copy()], [greedy])[0].token_id == int(row.argmax()) and len(greedy.mu) == 1
    seq = sequence(mirostat=2, temperature=1.0, seed=9)
    first = sample([row.copy()], [seq]), list(seq.mu)
    assert (sample([row.copy()], [seq]), list(seq.mu)) == first, "a step that is run again gives the same"


def test_mirostat_bears_any_surprise() -> None:
    values = np.linspace(5.0, 0.0, 100)
    assert mirostat.num_kept(values, 1e30, 1000) == 1000 and mirostat.num_kept(values, -1e30, 1000) == 1


# --- DRY ------------------------------------------------------------------------------------------------------


def dry_changes(tokens: list[int], **params: Any) -> dict[int, float]:
    return dry.penalties(sequence(tokens, **{"dry_multiplier": 0.8, **params}))


def test_dry_penalises_a_repetition_as_specified() -> None:
    # ... 1 2 3 4 ... 1 2 3: the 4 that followed would make the repetition 3 tokens longer
    assert dry_changes([1, 2, 3, 4, 9, 1, 2, 3]) == {4: pytest.approx(-0.8 * 1.75 ** (3 - 2))}
    assert dry_changes([1, 2, 3, 4, 9, 2, 3]) == {4: pytest.approx(-0.8)}
    assert dry_changes([1, 2, 3, 4, 9, 3]) == {}, "one token is allowed"
    assert dry_changes([1, 2, 3, 4, 9, 3], dry_allowed_length=1) == {4: pytest.approx(-0.8)}
    longest = dry_changes([7, 2, 3, 5, 1, 2, 3, 5, 9, 1, 2, 3])
    assert longest == {5: pytest.approx(-0.8 * 1.75)}, "of two places the longer repetition counts"
    assert dry_changes([5, 5, 5, 5, 5]) == {5: pytest.approx(-0.8 * 1.75 ** (4 - 2))}
    assert dry_changes([1, 2, 3, 4, 9, 1, 2, 3], dry_penalty_last_n=4) == {}
    assert dry_changes([1, 2, 3, 4, 9, 1, 2, 3], dry_penalty_last_n=7) == {4: pytest.approx(-0.8)}, "1 is out of the window"
    assert dry_changes([1, 2, 3, 4, 9, 1, 2, 3], dry_penalty_last_n=0) == {}
    assert dry_changes([1, 2, 3, 4, 9, 1, 2, 3], dry_base=0.5) == {}
    assert dry_changes([1, 2, 3], dry_allowed_length=-(2**31)) == dry_changes([1, 2, 3], dry_allowed_length=0)


def test_dry_breakers() -> None:
    tokens = [1, 2, 3, 4, 9, 1, 2, 3]
    assert dry_changes(tokens, dry_breakers=(2,)) == {}, "only the 3 stands after the breaker"
    assert dry_changes(tokens, dry_breakers=(1,)) == {4: pytest.approx(-0.8)}
    assert dry_changes(tokens, dry_breaker_sequences=((9, 1), (8, 8))) == {4: pytest.approx(-0.8)}
    assert dry_changes(tokens, dry_breaker_sequences=((9, 2),)) == {4: pytest.approx(-0.8 * 1.75)}
    assert dry_changes(tokens, dry_breaker_sequences=((2, 3),)) == {}


def test_where_the_last_breaker_ends() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        tokens = rng.integers(0, 4, size=int(rng.integers(1, 30))).tolist()
        singles = tuple(rng.integers(0, 8, size=int(rng.integers(0, 2))).tolist())
        several = tuple(tuple(rng.integers(0, 4, size=size).tolist()) for size in rng.integers(2, 5, size=3))
        seq = sequence(tokens, dry_breakers=singles, dry_breaker_sequences=several)
        ends = [at + 1 for at, token in enumerate(tokens) if token in singles]
        ends += [at for at in range(len(tokens) + 1) for own in several if tuple(tokens[:at][-len(own) :]) == own]
        assert dry._since_breaker(np.array(tokens), seq) == len(tokens) - max(ends, default=0)


def test_breakers_become_an_array_once() -> None:
    seq = sequence([1, 2, 3], dry_multiplier=0.8, dry_breakers=(5, 7))
    dry.penalties(seq)
    kept = seq.breakers
    dry.penalties(seq)
    assert kept is not None and seq.breakers is kept and all(row.breakers is kept for row in seq.rows(0))


def test_dry_of_a_long_repetition_is_bounded() -> None:
    changes = dry_changes([1, 2, 3] * 1000)
    assert changes == {1: pytest.approx(-0.8 * 1.75 ** int(dry.LOG_MOST / math.log(1.75)))}


def test_lengths_of_repetitions() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        tokens = rng.integers(0, 3, size=int(rng.integers(2, 60)))
        for limit in (1, 3, 1000):
            found = dry.repeated(tokens, limit)
            for place in range(len(tokens) - 1):
                length = 0
                while length < min(limit, place + 1) and tokens[place - length] == tokens[len(tokens) - 1 - length]:
                    length += 1
                assert found[place] == length


def test_dry_changes_the_choice() -> None:
    row = np.zeros(10, np.float32)
    row[4], row[5] = 1.0, 0.5
    tokens = [1, 2, 3, 4, 9, 1, 2, 3]
    plain, dried = sample(
        [row, row], [sequence(tokens, temperature=0.0), sequence(tokens, temperature=0.0, dry_multiplier=0.8)]
    )
    assert (plain.token_id, dried.token_id) == (4, 5)


# --- XTC ------------------------------------------------------------------------------------------------------


def test_xtc_takes_part_as_often_as_asked() -> None:
    """Two tokens reach the threshold: the likelier one is gone whenever XTC takes part, which is a draw of its own."""
    row = np.log(np.array([0.6, 0.3, 0.06, 0.04])).astype(np.float32)
    total = 6000
    for probability in (0.0, 0.25, 1.0):
        params = {**OPEN, "xtc_probability": probability, "xtc_threshold": 0.1}
        counts = np.bincount(
            [r.token_id for r in sample([row] * total, [sequence(seed=i, **params) for i in range(total)])], minlength=4
        )
        without = np.array([0.0, 0.3, 0.06, 0.04]) / 0.4
        wanted = total * ((1 - probability) * np.array([0.6, 0.3, 0.06, 0.04]) + probability * without)
        assert counts[wanted == 0].sum() == 0
        some = wanted > 0
        assert ((counts[some] - wanted[some]) ** 2 / wanted[some]).sum() < 20  # 3 degrees: p = 0.0002; the seeds are fixed


def test_xtc_leaves_rows_without_a_choice() -> None:
    params = {**OPEN, "xtc_probability": 1.0}
    sure = np.log(np.array([0.97, 0.01, 0.01, 0.01])).astype(np.float32)
    two = np.log(np.array([0.5, 0.45, 0.05])).astype(np.float32)
    assert {sample([sure], [sequence(seed=i, **params)])[0].token_id for i in range(200)} >= {0}
    assert 0 in {sample([two], [sequence(seed=i, xtc_threshold=0.6, **params)])[0].token_id for i in range(60)}
    assert 0 not in {sample([two], [sequence(seed=i, xtc_threshold=0.3, **params)])[0].token_id for i in range(60)}


# --- logit bias -----------------------------------------------------------------------------------------------


def test_logit_bias() -> None:
    rng = np.random.default_rng(3)
    row = (rng.normal(size=2000) * 5).astype(np.float32)
    best, worst = int(row.argmax()), int(row.argmin())
    assert sample([row.copy()], [sequence(temperature=0.0, logit_bias=((best, -100.0),))])[0].token_id != best
    forced = [sequence(seed=i, temperature=1.5, logit_bias=((worst, 100.0),)) for i in range(50)]
    results = sample([row.copy() for _ in forced], forced)
    assert {r.token_id for r in results} == {worst}
    told = sample([row.copy()], [sequence(temperature=0.0, logprobs=1, logit_bias=((worst, 100.0),))])[0].logprob
    exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
    assert told is not None and told.token_id == worst, "logprobs are the model's own"
    assert told.logprob == pytest.approx(exact[worst], abs=1e-9) and told.top[0][0] == best
    suppressed = sequence(temperature=0.0, suppress_ids=(worst,), logit_bias=((worst, 100.0),))
    assert sample([row.copy()], [suppressed])[0].token_id == best


# --- all together ---------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"top_k": 0},
    {"top_k": 0, "top_p": 1.0, "min_p": 0.05, "temperature": 1.5},
    OPEN,
    {"top_k": 2000, "top_p": 0.95},
    {"typical_p": 0.7},
    {"typical_p": 0.7, "top_k": 0, "top_p": 1.0},
    {"xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"xtc_probability": 0.5, "xtc_threshold": 0.05, "top_k": 0, "top_p": 1.0, "min_p": 0.02},
    {"mirostat": 1, "mirostat_tau": 3.0},
    {"mirostat": 2, "mirostat_tau": 3.0, "temperature": 1.2},
    {"dry_multiplier": 0.8, "dry_allowed_length": 1},
    {"repeat_penalty": 1.2, "frequency_penalty": 0.3},
    {"logit_bias": ((5, 3.0), (7, -3.0))},
]


def test_no_sampler_sees_its_batch_mates() -> None:
    rng = np.random.default_rng(8)
    kinds = [{**kind, "logprobs": 3 if i % 2 else -1} for i, kind in enumerate(KINDS * 2)]
    rows = [(rng.normal(size=9001) * [1.0, 3.0][i % 2]).astype(np.float32) for i in range(len(kinds))]
    tokens = rng.integers(0, 4, size=40).tolist()

    def sequences() -> list[Sequence]:
        return [sequence(tokens, generated=i, seed=i, **kind) for i, kind in enumerate(kinds)]

    made = sequences()
    together = sample([row.copy() for row in rows], made)
    again = sequences()
    order = rng.permutation(len(kinds))
    shuffled = sample([rows[i].copy() for i in order], [again[i] for i in order])
    for place, i in enumerate(order):
        assert shuffled[place] == together[i] and again[i].mu == made[i].mu, kinds[i]
    for i, seq in enumerate(sequences()):
        assert sample([rows[i].copy()], [seq])[0] == together[i] and seq.mu == made[i].mu, kinds[i]


def test_streams_of_one_seed_are_independent() -> None:
    first = np.array([filters.uniform(seed, 3) for seed in range(4000)])
    second = np.array([filters.uniform(seed, 3, 1) for seed in range(4000)])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
