"""Events of an engine on their way to the daemon, and which of them may wait for the next. Knows no socket and no engine.

Each message wakes the daemon, and that the client: 0.8 ms of a core's time together, whatever is in it, where a step of a small
model takes 3 ms on both cores. So tokens that come sooner than INTERVAL after the last message wait for the next step's.
First tokens, ends and everything else are sent at once, and with them what waited.
"""

from __future__ import annotations

from collections.abc import Sequence

from ollamapy.engine.protocol import Event, Step
from ollamapy.lifecycle.wire import encode

INTERVAL = 0.016  # seconds: a frame of a screen


class Outbox:
    """Times are of any clock in seconds."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self._going: set[int] = set()  # requests whose first token is on its way, and whose end is not
        self._last = 0.0

    def put(self, events: Sequence[Event], now: float, last: bool = False) -> bytes:
        """What is to be sent now, which may be nothing. `last`: nothing follows soon, so nothing may wait."""
        urgent = last
        for event in events:
            urgent |= not isinstance(event, Step) or self._note(event)
            self._waiting.append(encode(event))
        if not self._waiting or (not urgent and now - self._last < INTERVAL):
            return b""
        data = b"".join(self._waiting)
        self._waiting.clear()
        self._last = now
        return data

    def _note(self, step: Step) -> bool:
        """Whether the step has a first or last word of a request."""
        urgent = False
        for output in step.outputs:
            if output.finish is not None:
                self._going.discard(output.request_id)
                urgent = True
            elif output.token_ids and output.request_id not in self._going:
                self._going.add(output.request_id)
                urgent = True
        return urgent
