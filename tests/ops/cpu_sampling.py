"""Checks of the sampling kernels: selection as by a full sort, choices as the reference's, a row alone or among others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ollamapy import cpu_sampling
from ollamapy.engine.protocol import SamplingParams
from ollamapy.reference import sampling

SIZES = (1, 2, 17, 33, 255, 256, 257, 1000, 5003, 70_001)
NUM_ROWS = 40


def some_rows(vocab_size: int, kind: str) -> NDArray[np.float32]:
    """Flat, usual and steep rows; "ties": few distinct values; "masked": most are -infinity; "equal": all are one value."""
    rng = np.random.default_rng(vocab_size)
    scale = rng.choice([0.01, 0.3, 2.0, 6.0, 30.0], size=(NUM_ROWS, 1))
    rows = (rng.normal(size=(NUM_ROWS, vocab_size)) * scale).astype(np.float32)
    if kind == "ties":
        rows = np.round(rows, 1)
    elif kind == "masked":
        rows[:, rng.random(vocab_size) < 0.7] = -np.inf
        rows[:, vocab_size // 2] = 0.25
    elif kind == "equal":
        rows[:] = np.float32(-1.5)
        rows[0, :] = 0.0
        rows[1, 0] = -2.0
    return rows


def some_params(vocab_size: int) -> list[SamplingParams]:
    rng = np.random.default_rng(vocab_size + 1)
    return [
        SamplingParams(
            temperature=float(rng.choice([0.0, 0.2, 1.0, 1.0, 3.0])),
            top_k=int(rng.choice([-1, 0, 1, 2, 40, 64, 300, 1024, 1025, 2000, 10**6])),
            top_p=float(rng.choice([0.0, 0.1, 0.9, 0.999, 1.0, 2.0])),
            min_p=float(rng.choice([0.0, 0.05, 0.5, 1.0, 2.0, -1.0])),
        )
        for _ in range(NUM_ROWS)
    ]


KINDS = ("usual", "ties", "masked", "equal")


def check_largest() -> None:
    for size in SIZES:
        for kind in KINDS:
            rows = some_rows(size, kind)
            order = np.argsort(-rows, axis=1, kind="stable")
            for count in (1, 2, 64, 65, 1024, 3000):
                values, ids = cpu_sampling.largest(torch.from_numpy(rows), count)
                np.testing.assert_array_equal(ids, order[:, :count], err_msg=f"{size} {kind} {count}")
                np.testing.assert_array_equal(values, np.take_along_axis(rows, order[:, :count], 1))


def check_log_totals() -> None:
    """Every sum is of positive doubles, so its relative error, an absolute one after the logarithm, is below size * 2^-52; and
    the weights' own is below 2^-51."""
    for size in SIZES:
        for kind in KINDS:
            rows = some_rows(size, kind).astype(np.float64)
            best = rows.max(axis=1)
            exact = best + np.log(np.exp(rows - best[:, None]).sum(axis=1))
            found = cpu_sampling.log_totals(torch.from_numpy(rows.astype(np.float32)))
            assert np.abs(found - exact).max() < (size + 4) * 2.0**-52 + np.abs(exact).max() * 2.0**-52, (size, kind)


def check_draw() -> None:
    """The reference sorts whole rows and adds from the left. Both sums err by less than size * 2^-52, and no row of these seeds
    has a border so near to a token's."""
    for size in SIZES:
        for kind in KINDS:
            rows, params = torch.from_numpy(some_rows(size, kind)), some_params(size)
            uniforms = np.random.default_rng(size).random((NUM_ROWS, 2))
            uniforms[:2, 0] = 1.0 - 2.0**-53, 0.0
            tokens, probabilities = cpu_sampling.draw(rows, params, uniforms)
            wanted, exact = sampling.draw(rows, params, uniforms)
            wrong = np.flatnonzero(tokens != wanted)
            assert not len(wrong), (size, kind, params[wrong[0]], uniforms[wrong[0]])
            np.testing.assert_allclose(probabilities, exact, rtol=size * 2.0**-51 + 2.0**-48)


def check_rows_alone() -> None:
    for size in (33, 5003, 70_001):
        rows, params = torch.from_numpy(some_rows(size, "usual")), some_params(size)
        uniforms = np.random.default_rng(size).random((NUM_ROWS, 2))
        together = cpu_sampling.draw(rows, params, uniforms)
        totals = cpu_sampling.log_totals(rows)
        for row in range(NUM_ROWS):
            one = slice(row, row + 1)
            token, probability = cpu_sampling.draw(rows[one], params[one], uniforms[one])
            assert (token[0], probability[0]) == (together[0][row], together[1][row])
            assert cpu_sampling.log_totals(rows[one])[0] == totals[row]


def check_not_finite() -> None:
    for bad in (float("nan"), float("inf")):
        for size in (1, 300, 5003):
            rows = torch.zeros(3, size)
            rows[1, size - 1] = bad
            params = [SamplingParams(top_k=0)] * 3
            tokens, _ = cpu_sampling.draw(rows, params, np.zeros((3, 2)))
            assert tokens.tolist() == [0, -1, 0]
            assert np.isnan(cpu_sampling.log_totals(rows)).tolist() == [False, True, False]
            assert np.isnan(cpu_sampling.largest(rows, 1)[0][:, 0]).tolist() == [False, True, False]
    masked = torch.full((1, 300), -float("inf"))
    assert cpu_sampling.draw(masked, [SamplingParams()], np.zeros((1, 2)))[0].tolist() == [-1]
    assert cpu_sampling.log_totals(masked).tolist() == [-float("inf")]


def check_views() -> None:
    """Rows may stand apart; what lies between them is not read."""
    wide = torch.full((5, 700), float("nan"))
    rows = torch.from_numpy(some_rows(300, "usual"))[:5]
    wide[:, :300] = rows
    params, uniforms = some_params(300)[:5], np.full((5, 2), 0.5)
    assert (
        cpu_sampling.draw(wide[:, :300], params, uniforms)[0].tolist() == cpu_sampling.draw(rows, params, uniforms)[0].tolist()
    )
    assert cpu_sampling.largest(wide[:0, :300], 3)[0].shape == (0, 3)


def check_forbid() -> None:
    """Words of any, few, most, no and all bits, for some rows of six that stand apart."""
    rng = np.random.default_rng(5)
    for size in SIZES:
        any_bits, second, third = rng.integers(-(2**31), 2**31, (3, 4, -(-size // 32) + 2)).astype(np.int32)
        few, most = any_bits & second & third, any_bits | second | third
        kinds = [any_bits, few, most, np.zeros_like(few), np.full_like(few, -1)]
        words = np.choose(rng.integers(5, size=few.shape), kinds)
        ours = torch.randn(6, size + 37)
        expected = ours.clone()
        cpu_sampling.forbid(ours[:, :size], [4, 0, 2, 5], words)
        sampling.forbid(expected[:, :size], [4, 0, 2, 5], words)
        assert torch.equal(ours, expected), size
        cpu_sampling.forbid(ours, [], words[:0])
        assert torch.equal(ours, expected)


def checks() -> list[Callable[[], Any]]:
    return [check_largest, check_log_totals, check_draw, check_rows_alone, check_not_finite, check_views, check_forbid]
