"""One HTTP connection as uvicorn has it, and the end of those whose client does not read. Knows no request.

A write waits until the client has read what was written before. Without an end to that, a client that stops reading keeps its
model loaded, its seat in the queue, and every load that needs its memory waiting.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger(__name__)

STALLED = 60.0  # seconds in which nothing that waits to be written goes out


class Connection(HttpToolsProtocol):
    """Aborts itself when its client takes nothing for STALLED seconds; the request's handler is then cancelled as if the client
    had left. The kernel's buffers (some MB on loopback) come before: a client that reads slowly enough counts as one that does
    not."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._check: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._check_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_checking()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_checking()
        super().connection_lost(exc)

    def _check_later(self) -> None:
        self._stop_checking()
        self._check = self.loop.call_later(STALLED, self._abort_unless_less_than, self.transport.get_write_buffer_size())

    def _stop_checking(self) -> None:
        if self._check is not None:
            self._check.cancel()
            self._check = None

    def _abort_unless_less_than(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() < waiting:
            self._check_later()
            return
        log.warning("%s has read nothing for %.0f s: its connection is aborted", self.client or "a client", STALLED)
        self.transport.abort()
