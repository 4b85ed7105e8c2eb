"""Who is using which blobs, so that none is collected under a running create. Knows nothing of manifests.

Within a process: counted leases, and holds on fresh uploads until a manifest refers to them (or an hour has passed).
Between processes: two bytes of the file `.lock` in the store's folder, locked with POSIX record locks (per process, so
that one's own shared lock never stands in one's own way). Byte 0 is shared by every process with leases or holds and
taken exclusively, without waiting, by a collector: while another process works, nothing is collected. Byte 1 is
exclusive around each change of a manifest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ollamapy.store.digest import Digest
from ollamapy.store.fsops import FileOps, explained, make_dirs

HOLD_SECONDS = 3600.0
_IN_USE, _CHANGING = 0, 1
_BUSY = (errno.EACCES, errno.EAGAIN)


class Leases:
    """One per Library, and one Library per store in a process. `mutex` guards every change within this process."""

    def __init__(self, root: Path, fs: FileOps) -> None:
        self.mutex = threading.RLock()
        self._path, self._fs = root / ".lock", fs
        self._fd = -1
        self._counts: Counter[Digest] = Counter()
        self._running = 0
        self._holds: dict[Digest, float] = {}
        self._changing = 0
        self._local = threading.local()

    @contextmanager
    def lease(self, digests: Iterable[Digest] = ()) -> Iterator[None]:
        """While it is open, these blobs and those that this thread writes are not collected by anyone."""
        taken = list(digests)
        stack = self._own()
        with self.mutex:
            self._counts.update(taken)
            self._running += 1
            self._share()
        stack.append(taken)
        try:
            yield
        finally:
            stack.pop()
            with self.mutex:
                self._counts.subtract(taken)
                self._counts += Counter()  # drops what is no longer counted
                self._running -= 1
                self._share()

    def hold(self, digest: Digest) -> None:
        """A blob is about to get its name, or a client was told that it is there: a manifest will soon refer to it.

        Kept until the end of the lease that this thread has open; else until `release`, at most for HOLD_SECONDS.
        Waits for a collection that is under way, so that a blob published after this call stays.
        """
        leases = self._own()
        with self.mutex:
            if leases:
                leases[-1].append(digest)
                self._counts[digest] += 1
            else:
                self._holds[digest] = time.monotonic() + HOLD_SECONDS
                self._share()

    def release(self, digests: Iterable[Digest]) -> None:
        """A manifest refers to these now."""
        with self.mutex:
            for digest in digests:
                self._holds.pop(digest, None)
            self._share()

    def in_use(self, digest: Digest) -> bool:
        return self._counts[digest] > 0 or digest in self._holds

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around a change of a manifest and what goes with it; one at a time over all threads and processes."""
        with self.mutex:
            if self._changing == 0:
                self._lock(fcntl.LOCK_EX, _CHANGING)
            self._changing += 1
            try:
                yield
            finally:
                self._changing -= 1
                if self._changing == 0:
                    self._lock(fcntl.LOCK_UN, _CHANGING)

    @contextmanager
    def collecting(self) -> Iterator[bool]:
        """Yields whether blobs may be removed: False while another process is at work."""
        with self.mutex:
            if not self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, _IN_USE):
                yield False
                return
            try:
                yield True
            finally:
                self._share()

    def _own(self) -> list[list[Digest]]:
        """Digests of the leases that this thread has open, innermost last."""
        if not hasattr(self._local, "leases"):
            self._local.leases = []
        leases: list[list[Digest]] = self._local.leases
        return leases

    def close(self) -> None:
        """Lets go of all locks."""
        with self.mutex:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _share(self) -> None:
        now = time.monotonic()
        self._holds = {digest: until for digest, until in self._holds.items() if until > now}
        if self._running or self._holds:
            self._lock(fcntl.LOCK_SH, _IN_USE)
        elif self._fd >= 0:
            self._lock(fcntl.LOCK_UN, _IN_USE)

    def _lock(self, operation: int, byte: int) -> bool:
        """False when it would have to wait and was not to. The file stays open: closing it would drop all locks."""
        with explained("lock the model store"):
            if self._fd < 0:
                make_dirs(self._fs, self._path.parent)
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.lockf(self._fd, operation, 1, byte)
            except OSError as error:
                if error.errno in _BUSY:
                    return False
                raise
        return True
