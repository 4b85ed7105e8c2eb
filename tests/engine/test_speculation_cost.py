"""Which guesses are made: what steps cost, and what guesses have come to."""

from __future__ import annotations

import random

import pytest

from ollamapy.engine.speculation_cost import FORGOTTEN, StepCost, Track, allot, rounds


def test_cost_is_learnt_from_steps() -> None:
    """A line where nothing was measured, and a jump where one was."""
    cost = StepCost("cpu")
    rng = random.Random(0)

    def truth(rows: int) -> float:
        return 0.008 + 0.0015 * rows + (0.006 if rows == 5 else 0.0)

    for _ in range(2000):
        rows = rng.choice([1, 2, 5, 9, 16])
        cost.observe(rows, truth(rows) * rng.uniform(0.9, 1.1))
    for rows in (1, 2, 5, 9, 16):
        assert cost.seconds(rows) == pytest.approx(truth(rows), rel=0.1)
    assert cost.seconds(30) == pytest.approx(truth(30), rel=0.2)
    for _ in range(FORGOTTEN):
        cost.observe(2, truth(2))
    assert cost.seconds(5) < 1.25 * truth(4), "what was long ago is tried again"


def test_cost_of_rows_never_seen_is_assumed() -> None:
    cost = StepCost("cpu")
    assert not cost.known
    for _ in range(100):
        cost.observe(1, 0.010)
    assert cost.known and cost.seconds(1) == pytest.approx(0.010) and cost.seconds(3) == pytest.approx(0.013)
    cost.observe(1, 10.0)
    assert cost.seconds(1) < 0.014, "a step that something else held up"


class Line(StepCost):
    known = True

    def __init__(self, base: float, per_row: float, jump: int = 1000) -> None:
        super().__init__("cpu")
        self._line = base, per_row, jump

    def seconds(self, rows: int) -> float:
        base, per_row, jump = self._line
        return base + per_row * rows + (base if rows >= jump else 0.0)


def test_guesses_are_verified_where_they_pay() -> None:
    cost = Line(10.0, 1.0)
    assert allot([0.9], [8], 1, 99, cost) == [8]
    assert allot([0.1], [8], 1, 99, cost) == [0], "1.1 tokens in 12 are no more than 1 in 11"
    assert allot([0.6], [8], 1, 99, cost) == [3], "1 + 0.6 + 0.36 + 0.22 in 14; a fourth makes it 2.31 in 15"
    assert allot([0.6] * 32, [8] * 32, 32, 99, cost) == [0] * 32
    assert allot([0.95] + [0.3] * 15, [8] * 16, 16, 99, cost)[0] > 2
    assert sum(allot([0.99] * 4, [8] * 4, 4, 10, cost)) == 6, "never beyond the budget"
    assert allot([0.99], [8], 1, 99, StepCost("cpu")) == [0], "not before the first step was measured"
    assert allot([0.8], [8], 4, 99, Line(10.0, 0.5, jump=5)) == [0], "the fifth row doubles the price"
    assert allot([0.99] * 4, [8] * 4, 4, 99, Line(10.0, 0.5, jump=5)) == [8] * 4, "which many of them pay"


def test_a_draft_model_is_asked_where_it_pays() -> None:
    cost = Line(10.0, 1.0)
    assert rounds([0.9], [8], 1, cost, 0.0) == 1, "to see what it takes"
    assert rounds([0.9], [8], 1, cost, 0.5) == 8 > rounds([0.9], [8], 1, cost, 3.0) > 0
    assert rounds([0.9], [8], 1, cost, 11.0) == 0, "as slow as the model itself"
    assert rounds([0.5] * 32, [8] * 32, 32, cost, 2.0) == 0
    assert rounds([0.9, 0.9], [2, 1], 2, cost, 0.1) == 2


def test_rates_follow_what_came() -> None:
    track = Track()
    for _ in range(40):
        track.open([1, 2, 3], Track.bucket_of(9), 0)
        track.close([1, 2, 4])
    right = track.rates[2]
    assert 0.55 < right < 0.75, "two of three came true"
    assert track.rates[:2] == Track().rates[:2] and track.rates[3] == Track().rates[3], "of other matches nothing was learnt"
