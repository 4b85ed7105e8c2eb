"""A user's own files, as the store takes them in: opened with care, hashed. Never written to."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ollamapy.errors import BadRequest, NotFound
from ollamapy.store.digest import Digest

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""

CHUNK = 4 << 20


def older(status: os.stat_result, age: float) -> bool:
    return time.time() - status.st_mtime >= age


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A user's regular file, opened for reading. NotFound, or BadRequest for folders, devices, pipes and sockets."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(f"{path.name}: no such file") from None
    except OSError as error:
        raise BadRequest(f"{path.name}: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BadRequest(f"{path.name} is not a regular file")
        yield fd
    finally:
        os.close(fd)


def hash_file(path: Path, progress: Progress | None = None) -> Digest:
    """Digest of a regular file. Raises as `opened`."""
    with opened(path) as fd:
        return hash_open(fd, os.fstat(fd).st_size, progress)


def hash_open(fd: int, size: int, progress: Progress | None) -> Digest:
    sha256, done = hashlib.sha256(), 0
    while chunk := os.pread(fd, CHUNK, done):
        sha256.update(chunk)
        done += len(chunk)
        if progress is not None:
            progress(done, size)
    return Digest.from_hash(sha256)
