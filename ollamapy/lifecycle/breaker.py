"""Stops a model whose engine crashes again and again from being started again and again."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable

from ollamapy.errors import EngineError

CRASHES = 3
WITHIN = 60.0  # seconds
REST = 30.0  # seconds without a new start


class Breaker:
    """Times of crashes by key: a model and the options that its engine was started with, so that options which no engine bears
    stop only those who ask for them. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._crashes: dict[Hashable, deque[float]] = {}
        self._resting: dict[Hashable, tuple[float, str]] = {}  # until when, and the last reason

    def record(self, key: Hashable, reason: str) -> None:
        now = self._clock()
        for old in [key for key, times in self._crashes.items() if now - times[-1] > WITHIN]:
            del self._crashes[old]
            self._resting.pop(old, None)
        times = self._crashes.setdefault(key, deque(maxlen=CRASHES))
        times.append(now)
        if len(times) == CRASHES and now - times[0] <= WITHIN:
            self._resting[key] = (now + REST, reason)

    def check(self, key: Hashable) -> None:
        """Raises EngineError while the model rests."""
        until, reason = self._resting.get(key, (0.0, ""))
        left = until - self._clock()
        if left > 0:
            raise EngineError(
                f"the model runner stopped {CRASHES} times within {WITHIN:.0f} s and is not started again "
                f"for {math.ceil(left)} s; the last reason: {reason}"
            )
        self._resting.pop(key, None)
