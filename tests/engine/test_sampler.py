"""The sampler against a plain implementation of llama.cpp's steps, written row by row from their description."""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ollamapy.engine import filters
from ollamapy.engine.filters import Candidates
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sampler import NOT_FINITE, Sampler
from ollamapy.engine.sequence import Result, Sequence
from ollamapy.reference.sampling import HEAD, WHOLE, largest, log_totals, num_candidates

Row = NDArray[np.float32]


def sequence(prompt: list[int] | None = None, generated: int = 0, **params: Any) -> Sequence:
    seq = Sequence(0, array("q", prompt or [0]), SamplingParams(**params), context_length=4096, seed=params.get("seed", 0))
    seq.num_generated = generated
    return seq


def sample(rows: list[Row], sequences: list[Sequence]) -> list[Result]:
    return Sampler().sample(torch.from_numpy(np.stack(rows)), sequences)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def survivors(row: Row, p: SamplingParams) -> list[tuple[int, float]]:
    """Ids and logits that top_k, typical_p, top_p and min_p leave, likeliest first, each step normalised anew."""
    left = sorted(enumerate(row.astype(np.float64).tolist()), key=lambda pair: (-pair[1], pair[0]))
    if p.top_k > 0:
        left = left[: p.top_k]
    if p.typical_p < 1.0:
        probability = softmax(np.array([logit for _, logit in left]))
        entropy = -sum(q * math.log(q) for q in probability if q > 0)
        order = sorted(range(len(left)), key=lambda i: abs(-math.log(max(probability[i], 1e-300)) - entropy))
        mass, taken = 0.0, []
        for i in order:
            taken.append(i)
            mass += probability[i]
            if mass > p.typical_p:
                break
        left = [left[i] for i in sorted(taken)]
    if p.top_p < 1.0:
        probability = softmax(np.array([logit for _, logit in left]))
        mass, count = 0.0, 0
        for q in probability:
            mass += q
            count += 1
            if mass >= p.top_p:
                break
        left = left[:count]
    if p.min_p > 0.0:
        probability = softmax(np.array([logit for _, logit in left]))
        left = [pair for i, pair in enumerate(left) if i == 0 or probability[i] >= p.min_p * probability[0]]
    return left


def expected_token(row: Row, seq: Sequence) -> int:
    """What a row must give: by the survivors' order and the same uniform number."""
    p = seq.params
    if p.temperature <= 0:
        return int(np.argmax(row))
    unfiltered = not 0 < p.top_k < len(row) and p.top_p >= 1 and p.min_p <= 0 and p.typical_p >= 1
    left = list(enumerate(row.astype(np.float64).tolist())) if unfiltered else survivors(row, p)
    logits = np.array([logit for _, logit in left])
    cumulative = np.cumsum(softmax((logits - logits.max()) / p.temperature))
    return left[int((cumulative <= filters.uniform(seq.seed, seq.num_generated) * cumulative[-1]).sum())][0]


def some_logits(rng: np.random.Generator, size: int) -> Row:
    return (rng.normal(size=size) * rng.choice([0.3, 2.0, 6.0])).astype(np.float32)


@pytest.mark.parametrize("vocab_size", [1, 2, 33, 1000, 5003])
def test_equal_to_the_plain_implementation(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    rows, sequences = [], []
    for i in range(150):
        rows.append(some_logits(rng, vocab_size))
        sequences.append(
            sequence(
                generated=i,
                seed=i,
                temperature=float(rng.choice([0.0, 0.2, 1.0, 3.0])),
                top_k=int(rng.choice([-1, 0, 1, 2, 40, 64, 65, 300, 2000, 10**6])),
                top_p=float(rng.choice([0.0, 0.1, 0.9, 0.999, 1.0, 2.0])),
                min_p=float(rng.choice([0.0, 0.05, 0.5, 1.0, 2.0, -1.0])),
                typical_p=float(rng.choice([1.0, 1.0, 0.0, 0.2, 0.9])),
            )
        )
    results = sample(rows, sequences)
    for row, seq, result in zip(rows, sequences, results, strict=True):
        assert result.token_id == expected_token(row, seq), seq.params


def test_a_row_alone_is_the_row_in_a_batch() -> None:
    """64 rows of all kinds at real vocabulary sizes: bit for bit the same choice, alone, together and in another order."""
    for vocab_size in (49152, 32003):
        rng = np.random.default_rng(2)
        rows = [some_logits(rng, vocab_size) for _ in range(64)]
        sequences = [
            sequence(
                [1, 2, 3, 3],
                generated=i,
                seed=i * 7,
                temperature=[0.0, 0.8, 1.5, 0.8][i % 4],
                top_k=[40, 0, 100, 1000, 3000][i % 5],
                top_p=[0.9, 1.0, 0.5][i % 3],
                min_p=[0.0, 0.02][i % 2],
                typical_p=[1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0][i % 7],
                repeat_penalty=[1.0, 1.2][i % 2],
                logprobs=[-1, 0, 5][i % 3],
            )
            for i in range(64)
        ]
        together = sample(rows, sequences)
        order = rng.permutation(64)
        shuffled = sample([rows[i] for i in order], [sequences[i] for i in order])
        for place, i in enumerate(order):
            assert shuffled[place] == together[i]
        for i in range(64):
            assert sample([rows[i]], [sequences[i]])[0] == together[i]


def test_a_seed_and_a_position_decide() -> None:
    row = np.zeros(100, np.float32)
    params = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def tokens(seed: int, positions: range) -> list[int]:
        return [
            r.token_id for r in sample([row] * len(positions), [sequence(generated=i, seed=seed, **params) for i in positions])
        ]

    assert tokens(1, range(50)) == tokens(1, range(50))
    assert tokens(1, range(50))[20:30] == tokens(1, range(20, 30))
    assert tokens(1, range(50)) != tokens(2, range(50))
    assert tokens(0, range(1, 50)) != tokens(1, range(49)), "streams of neighbouring seeds are not shifted copies"


def test_uniform_numbers_are_uniform() -> None:
    values = np.array([filters.uniform(seed, position) for seed in range(200) for position in range(100)])
    assert values.min() >= 0.0 and values.max() < 1.0
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    assert ((counts - 200.0) ** 2 / 200.0).sum() < 150  # chi-square of 99 degrees: 150 has p = 0.0007; the seeds are fixed
    grid = values.reshape(200, 100)
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert filters.uniform(2**64 + 5, 3) == filters.uniform(5, 3) != filters.uniform(5, 4)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 0, "top_p": 1.0, "temperature": 1.0},
        {"top_k": 0, "top_p": 1.0, "temperature": 2.0},
        {"top_k": 8, "top_p": 1.0, "temperature": 0.7},
        {"top_k": 0, "top_p": 0.8, "temperature": 1.0},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.2, "temperature": 1.3},
        {"top_k": 0, "top_p": 1.0, "typical_p": 0.6, "temperature": 1.0},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, float]) -> None:
    row = np.random.default_rng(4).normal(size=16).astype(np.float32)
    total = 8000
    sequences = [sequence(generated=i % 80, seed=i // 80, **params) for i in range(total)]
    counts = np.bincount([r.token_id for r in sample([row] * total, sequences)], minlength=16)
    left = survivors(row, sequences[0].params)
    wanted = np.zeros(16)
    wanted[[i for i, _ in left]] = softmax(np.array([logit for _, logit in left]) / params["temperature"]) * total
    assert counts[wanted == 0].sum() == 0
    inside = wanted > 0
    chi_square = ((counts[inside] - wanted[inside]) ** 2 / wanted[inside]).sum()
    assert chi_square < inside.sum() - 1 + 4 * math.sqrt(2 * inside.sum())


def test_penalties() -> None:
    """Against the definition, over the window, prompt included; the same token may be in it many times."""
    rng = np.random.default_rng(5)
    prompt = [3, 3, 3, 7, 9, 1, 3, 40]
    for last_n, window in ((0, []), (2, prompt[-2:]), (5, prompt[-5:]), (64, prompt), (-1, prompt)):
        row = rng.normal(size=50).astype(np.float32) * 3
        wanted = row.copy()
        for token in set(window):
            wanted[token] = wanted[token] * np.float32(1.3) if wanted[token] <= 0 else wanted[token] / np.float32(1.3)
            wanted[token] -= np.float32(window.count(token)) * np.float32(0.5) + np.float32(0.25)
        params = {"repeat_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.25, "repeat_last_n": last_n}
        logits = torch.from_numpy(np.stack([row, row]))
        Sampler().sample(logits, [sequence(prompt, temperature=0.0, **params), sequence(prompt, temperature=0.0)])
        np.testing.assert_array_equal(logits[0].numpy(), wanted)
        np.testing.assert_array_equal(logits[1].numpy(), row)


def test_penalty_window_moves_with_what_is_generated() -> None:
    seq = sequence([1, 2, 3, 2], repeat_penalty=1.1, repeat_last_n=3)
    assert seq.penalties is not None and seq.penalties.counts == {2: 2, 3: 1}
    for token, counts in ((5, {2: 1, 3: 1, 5: 1}), (5, {2: 1, 5: 2}), (2, {5: 2, 2: 1}), (1, {5: 1, 2: 1, 1: 1})):
        seq.accept(token)
        assert seq.penalties.counts == counts
    assert sequence([1], repeat_last_n=3).penalties is None
    assert sequence([1], repeat_last_n=0, repeat_penalty=2.0).penalties is None


def test_penalties_decide_the_greedy_choice() -> None:
    row = np.array([5.0, 4.9, 1.0], np.float32)
    assert sample([row], [sequence([0], temperature=0.0, presence_penalty=0.2)])[0].token_id == 1
    assert sample([row], [sequence([0, 1, 1], temperature=0.0, frequency_penalty=2.0)])[0].token_id == 0


def test_suppressed_ids_are_never_chosen() -> None:
    row = np.arange(10, dtype=np.float32)
    rows = [row] * 4
    sequences = [
        sequence(temperature=0.0, suppress_ids=(9, 8, 10**6, -3)),
        sequence(temperature=0.0),
        sequence(temperature=0.0, suppress_ids=(9,)),
        sequence(temperature=1.0, top_k=0, top_p=1.0, suppress_ids=tuple(range(1, 10))),
    ]
    assert [r.token_id for r in sample(rows, sequences)] == [7, 9, 8, 0]
    everything = sequence(temperature=0.7, suppress_ids=tuple(range(10)))
    assert sample([row], [everything])[0].error == NOT_FINITE


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_k": 40},
        {"top_k": 0},
        {"top_k": 0, "top_p": 1.0},
        {"top_k": 0, "typical_p": 0.5},
        {"top_k": 5000},
    ],
)
def test_rows_that_are_not_finite_fail_alone(bad: float, params: dict[str, Any]) -> None:
    rng = np.random.default_rng(6)
    rows = [rng.normal(size=9000).astype(np.float32) for _ in range(4)]
    good = sample([rows[0].copy(), rows[2].copy()], [sequence(**params), sequence(**params)])
    if bad == -math.inf:
        rows[1][:] = bad
        rows[3][5:] = bad  # -inf at some tokens only is a mask, not an error
    else:
        rows[1][8999] = bad
    results = sample([row.copy() for row in rows], [sequence(logprobs=2, **params) for _ in rows])
    assert [bool(r.error) for r in results] == [False, True, False, False]
    assert [r.token_id for r in (results[0], results[2])] == [r.token_id for r in good]
    if bad == -math.inf:
        assert results[3].token_id < 5


@pytest.mark.parametrize("level", [1, 64, 256, 1024])
@pytest.mark.parametrize("vocab_size", [1, 7, 64, 65, 9000, 40001])
def test_largest_is_a_stable_sort(level: int, vocab_size: int) -> None:
    """With few distinct values: ties inside, at the cut and everywhere."""
    rng = np.random.default_rng(vocab_size)
    for distinct in (1, 3, 50, 10**6):
        rows = rng.integers(0, distinct, size=(5, vocab_size)).astype(np.float32)
        rows[4, : vocab_size // 2] = -np.inf
        values, ids = largest(torch.from_numpy(rows), level)
        order = np.argsort(-rows, axis=1, kind="stable")[:, :level]
        wanted = np.take_along_axis(rows, order, 1)
        np.testing.assert_array_equal(values, wanted)
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(ids[finite], order[finite])


def test_ties_go_to_the_lowest_id() -> None:
    row = np.zeros(50_000, np.float32)
    row[[700, 33_000, 49_999]] = 1.0
    assert sample([row], [sequence(temperature=0.0)])[0].token_id == 700
    tokens = {
        sample([row], [sequence(seed=i, temperature=1.0, top_k=2, top_p=1.0)])[0].token_id for i in range(40)
    }  # the third of equals is cut off
    assert tokens == {700, 33_000}


def test_reach_of_the_head() -> None:
    """Without top_k the head of the row decides when top_p ends in it, else the whole row; both follow the definition."""
    size = 20_000
    rng = np.random.default_rng(8)
    flat = (rng.normal(size=size) * 0.01).astype(np.float32)
    steep = some_logits(rng, size) * 6
    rows = [flat, steep, np.round(flat, 2).astype(np.float32), flat]
    sequences = [
        sequence(seed=3, temperature=1.0, top_k=0, top_p=0.9),
        sequence(seed=4, temperature=1.0, top_k=0, top_p=0.9),
        sequence(seed=5, temperature=1.0, top_k=0, top_p=0.02),
        sequence(seed=6, temperature=1.0, top_k=size, top_p=1.0, min_p=0.99),
    ]
    assert [num_candidates(seq.params, size) for seq in sequences] == [HEAD] * 4
    assert [r.token_id for r in sample(rows, sequences)] == [
        expected_token(row, seq) for row, seq in zip(rows, sequences, strict=True)
    ]
    assert num_candidates(SamplingParams(top_k=0, top_p=1.0), size) == WHOLE
    assert num_candidates(SamplingParams(), size) == 64


def test_extreme_temperatures() -> None:
    row = np.array([1.0, 3.0, 2.0, -500.0], np.float32)
    for temperature in (1e-30, 1e-300, 5e-324, 0.0, -1.0):
        assert sample([row], [sequence(temperature=temperature, top_k=3)])[0].token_id == 1
        assert sample([row], [sequence(temperature=temperature, top_k=0, top_p=1.0)])[0].token_id == 1
    hot = {sample([row], [sequence(seed=i, temperature=1e300, top_k=4, top_p=1.0)])[0].token_id for i in range(60)}
    assert hot == {0, 1, 2, 3}, "what is unlikely is not gone"


def test_largest_uniform_stays_inside() -> None:
    rows = Candidates.of(np.array([[1.0, 0.5, 0.1, -np.inf]], np.float32))
    below_one = np.array([1.0 - 2.0**-53])
    assert filters.draw(rows, [SamplingParams(temperature=1.0)], below_one)[0].tolist() == [2]
    assert filters.draw(rows, [SamplingParams(temperature=1.0)], np.array([0.0]))[0].tolist() == [0]
    assert filters.draw_unfiltered(np.array([1.0, 0.5, -np.inf], np.float32), 1.0, float(below_one[0]))[0] == 1
    assert filters.draw_unfiltered(np.array([-np.inf, 0.5, 0.1], np.float32), 1.0, 0.0)[0] == 1


def test_logprobs_are_those_of_the_raw_logits() -> None:
    rng = np.random.default_rng(9)
    rows = [some_logits(rng, 3000) for _ in range(4)]
    sequences = [
        sequence([1, 2], temperature=0.0, logprobs=0, repeat_penalty=1.5, presence_penalty=3.0),
        sequence(temperature=1.4, logprobs=7, top_k=50, suppress_ids=tuple(int(i) for i in np.argsort(-rows[1])[:3])),
        sequence(temperature=0.0),
        sequence(temperature=0.0, logprobs=5000),
    ]
    results = sample([row.copy() for row in rows], sequences)
    assert results[2].logprob is None
    for i, count in ((0, 0), (1, 7), (3, 3000)):
        exact = rows[i].astype(np.float64) - np.log(np.exp(rows[i].astype(np.float64)).sum())
        logprob = results[i].logprob
        assert logprob is not None and logprob.token_id == results[i].token_id
        assert logprob.logprob == pytest.approx(exact[logprob.token_id], abs=1e-5)
        assert [token for token, _ in logprob.top] == np.argsort(-rows[i], kind="stable")[:count].tolist()
        np.testing.assert_allclose([value for _, value in logprob.top], np.sort(exact)[::-1][:count], atol=1e-5)
    assert results[1].logprob is not None and results[1].token_id not in [t for t, _ in results[1].logprob.top[:3]]


def test_log_totals_of_a_row_do_not_depend_on_the_others() -> None:
    rows = torch.randn(9, 262_144, generator=torch.Generator().manual_seed(1))
    together = log_totals(rows)
    for i in range(9):
        assert log_totals(rows[i : i + 1])[0] == together[i]


def test_half_precision_logits() -> None:
    row = np.random.default_rng(3).normal(size=500).astype(np.float32)
    logits = torch.from_numpy(row).bfloat16()[None].repeat(3, 1)
    results = Sampler().sample(logits, [sequence(temperature=0.0), sequence(seed=1), sequence(seed=1, top_k=0, top_p=1.0)])
    assert all(0 <= result.token_id < 500 and not result.error for result in results)
