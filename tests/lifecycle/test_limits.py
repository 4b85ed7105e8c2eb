"""How many may wait, of all and of one client, and when to come again."""

from __future__ import annotations

import pytest

from ollamapy.errors import ServerBusy
from ollamapy.lifecycle.limits import Limits


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_limits() -> None:
    limits = Limits(4, 1, Clock())
    for client in "aabb":
        limits.enter("m", client, 1)
    with pytest.raises(ServerBusy) as own:
        limits.enter("m", "a", 1)
    assert own.value.limit == "client"
    limits.enter("m", "", 1)
    with pytest.raises(ServerBusy) as full:
        limits.enter("m", "c", 1)
    assert full.value.limit == "model"
    limits.enter("other", "a", 1)
    limits.leave("m", "b")
    limits.enter("m", "c", 1)
    for model, client in [*(("m", client) for client in ("a", "a", "b", "", "c")), ("other", "a")]:
        limits.leave(model, client)
    assert len(limits) == 0 and not limits._of_client


def test_weights() -> None:
    """One that counts as many is let in where nothing is, however many that is."""
    limits = Limits(4, 3, Clock())
    limits.enter("m", "a", 1, 50)
    with pytest.raises(ServerBusy) as full:
        limits.enter("m", "b", 1)
    assert full.value.limit == "model"
    limits.leave("m", "a", 50)
    limits.enter("m", "a", 1, 2)
    with pytest.raises(ServerBusy) as own:
        limits.enter("m", "a", 1, 3)
    assert own.value.limit == "client"
    limits.enter("m", "b", 1, 3)
    limits.leave("m", "a", 2)
    limits.leave("m", "b", 3)
    assert len(limits) == 0 and not limits._of_client


def test_retry_after_is_measured() -> None:
    clock = Clock()
    limits = Limits(10, 0, clock)
    assert limits.retry_after("m", 5) == 1, "nothing is known yet"
    for _ in range(30):
        clock.now += 0.5
        limits.enter("m", "a", 1)
        limits.leave("m", "a")
    assert 4 <= limits.retry_after("m", 10) <= 6
    clock.now += 30
    assert limits.retry_after("m", 10) > 10, "nothing has ended for a while"
    clock.now += 60
    assert limits.retry_after("m", 10) == 1
    for _ in range(3):
        clock.now += 19
        limits.enter("m", "a", 1)
        limits.leave("m", "a")
    assert limits.retry_after("m", 1000) == 300
