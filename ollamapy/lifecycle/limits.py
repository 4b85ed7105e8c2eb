"""How many requests may be at a model, all together and of one client, and when one that is refused should come again.

Numbers only: knows no engine. A model's queue is what is there beyond its seats, the sequences that it runs together.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable

from ollamapy.errors import ServerBusy

QUEUE_FULL = "server busy, please try again.  maximum pending requests exceeded"
CLIENT_FULL = "server busy, please try again.  this client has {} requests here, and at most {} may wait"
SHARE = 2  # a client may fill one part in so many of the queue, unless told otherwise
MEASURED = 64  # requests that ended, of which the rate is taken
WITHIN = 60.0  # seconds that count for the rate
LEAST_WAIT, MOST_WAIT = 1, 300  # seconds of Retry-After


class Limits:
    """`most`: requests that may wait for a model; `per_client`: of a named client, 0: half of `most`. `clock` in seconds."""

    def __init__(self, most: int, per_client: int, clock: Callable[[], float]) -> None:
        self._most, self._per_client, self._clock = most, per_client or max(1, most // SHARE), clock
        self._here: Counter[Hashable] = Counter()
        self._of_client: Counter[tuple[Hashable, str]] = Counter()
        self._ends: dict[Hashable, deque[float]] = {}

    def __len__(self) -> int:
        return self._here.total()

    def enter(self, model: Hashable, client: str, seats: int, weight: int = 1) -> None:
        """One more request, which counts as `weight`. Raises ServerBusy when that is too many; never where nothing is there."""
        here, own = self._here[model], self._of_client[model, client]
        if here and here + weight > seats + self._most:
            raise ServerBusy(QUEUE_FULL, self.retry_after(model, here + weight - seats), "model")
        if client and own and own + weight > seats + self._per_client:
            raise ServerBusy(CLIENT_FULL.format(own, self._per_client), self.retry_after(model, own + weight - seats), "client")
        self._here[model] += weight
        self._of_client[model, client] += weight

    def leave(self, model: Hashable, client: str, weight: int = 1) -> None:
        """A request has ended, in whatever way."""
        self._here[model] -= weight
        self._of_client[model, client] -= weight
        if not self._of_client[model, client]:
            del self._of_client[model, client]
        self._ends.setdefault(model, deque(maxlen=MEASURED)).append(self._clock())

    def retry_after(self, model: Hashable, waiting: int) -> int:
        """Seconds in which so many requests end, as fast as the last ones did."""
        now = self._clock()
        ends = [at for at in self._ends.get(model, ()) if at > now - WITHIN]
        if not ends:
            return LEAST_WAIT
        return max(LEAST_WAIT, min(MOST_WAIT, math.ceil(waiting * (now - ends[0]) / len(ends))))
