"""The order and the sizes of steps for many users, where steps take what a formula says: no figure depends on the machine."""

from __future__ import annotations

import pytest

from bench.schedule import COSTS, Loop


@pytest.mark.parametrize("users", [16, 32])
@pytest.mark.parametrize("model", COSTS)
def test_the_first_burst_does_not_wait_for_anything_to_be_learnt(model: str, users: int) -> None:
    """All its prompts alone are at least 34 tokens each; twice that with those that decode meanwhile, and no longer gaps than
    CROWDED allows."""
    cost = COSTS[model]
    found = Loop(cost, "short").run(users)
    assert found["TTFT p99"] <= 2.0e3 * cost.seconds(0, 34 * users)
    assert found["gap p99"] <= 1e3 * (0.1 + cost.seconds(users, 1))


@pytest.mark.parametrize("model", COSTS)
def test_prompts_that_come_together_end_one_after_the_other(model: str) -> None:
    """The first of 16 takes a sixteenth of what all take; nobody waits much longer than 16 prompts take, though others come."""
    cost, users = COSTS[model], 16
    loop = Loop(cost, "separate")
    found = loop.run(users)
    firsts = sorted(loop.arrivals[number][0] for number in range(users))
    assert all(first <= 1.6 * (place + 1) * cost.seconds(0, 1072) for place, first in enumerate(firsts))
    assert found["TTFT p99"] <= 1.6e3 * users * cost.seconds(0, 1072)


def test_short_prompts_do_not_wait_for_long_ones() -> None:
    loop = Loop(COSTS["gemma3"], "mixed")
    loop.run(16)
    short = [loop.arrivals[number][0] - loop.sent[number] for number in range(32) if number % 4]
    long = [loop.arrivals[number][0] - loop.sent[number] for number in range(32) if not number % 4]
    assert max(short) < 1.0 < sorted(long)[-2] and max(long) < 5.0
