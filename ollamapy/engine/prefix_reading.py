"""Pages on their way from files to the pool: one thread fills buffers, the other empties them. Knows no file and no tensor.

The buffers go round. Memory that is touched for the first time costs more than all else of reading: 49 of 55 ms for 40 MB of
files that the system has in its cache, against 6 with buffers that were used before.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import NamedTuple

BUFFER_BYTES = 32 << 20  # of all buffers: what a step of the engine copies at most
LEAST = 2  # buffers, however large: one is filled while the other is emptied
PATIENCE = 0.05  # seconds after which a thread that waits for a buffer looks whether anybody still wants the page

Pages = Mapping[int, bytes | bytearray | memoryview]
"""Layer group -> page."""


class Buffers:
    """Lends memory to one thread; any thread gives it back. The one given back last goes first: it is in the caches."""

    def __init__(self) -> None:
        self._free: queue.LifoQueue[bytearray] = queue.LifoQueue()
        self._count = 0

    @property
    def num_lent(self) -> int:
        return self._count - self._free.qsize()

    def take(self, size: int, reading: Reading) -> bytearray | None:
        """At least `size` bytes, as soon as there are. None when `reading` is cancelled meanwhile."""
        while not reading.is_cancelled:
            may_make = self._count < max(LEAST, BUFFER_BYTES // max(size, 1))
            try:
                buffer = self._free.get(timeout=0 if may_make else PATIENCE)
            except queue.Empty:
                if not may_make:
                    continue
                self._count += 1
                return bytearray(size)
            return buffer if len(buffer) >= size else bytearray(size)
        return None

    def give(self, buffer: bytearray) -> None:
        self._free.put(buffer)


class Page(NamedTuple):
    digest: bytes
    pages: Pages  # in `buffer`
    buffer: bytearray


class Reading:
    """A chain that is being read: its pages in order, and an end, before which some may be missing."""

    def __init__(self, digests: tuple[bytes, ...], buffers: Buffers) -> None:
        self.digests, self._buffers = digests, buffers
        self._come: queue.SimpleQueue[Page | None] = queue.SimpleQueue()
        self.is_cancelled = self.has_ended = False
        self.num_bytes, self.seconds = 0, 0.0  # that reading took, of those that came

    def put(self, page: Page | None) -> None:
        """By the thread that reads. None: no other follows."""
        self._come.put(page)
        if self.is_cancelled:
            self._drain()

    def next(self, wait: float) -> Page | None:
        """The next page, once it comes; None when none does within `wait` seconds, or no other follows: `has_ended`. The page
        goes back by `done`."""
        if self.has_ended:
            return None
        try:
            page = self._come.get(timeout=wait) if wait > 0 else self._come.get_nowait()
        except queue.Empty:
            return None
        self.has_ended = page is None
        return page

    def done(self, page: Page) -> None:
        self._buffers.give(page.buffer)

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.is_cancelled = True
        self._drain()

    def _drain(self) -> None:
        while (page := self.next(0)) is not None:
            self.done(page)
