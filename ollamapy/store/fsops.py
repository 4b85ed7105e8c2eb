"""The one object through which the store touches files, so that a test can record every operation or make it fail.

Each method is one system call (or one that a crash cannot split), and nothing else. Knows nothing of models.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ollamapy.errors import StoreError

_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class FileOps:
    """Production: thin calls of `os`. Raises OSError."""

    def create(self, path: Path) -> int:
        """A new, empty file, open for writing and reading back."""
        return os.open(path, _NEW, 0o600)

    def read(self, path: Path, limit: int) -> bytes:
        """At most `limit` bytes of a file."""
        with open(path, "rb") as file:
            return file.read(limit)

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        """Bytes written, perhaps fewer than given."""
        return os.pwrite(fd, data, offset)

    def copy_range(self, source: int, target: int, count: int, offset: int) -> int:
        """Copies within the kernel (shares blocks where the file system can); bytes copied, perhaps fewer."""
        return os.copy_file_range(source, target, count, offset, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def chmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path, 0o700)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def fsync_dir(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self, path: Path) -> int:
        """What an unprivileged user may still write to the file system of `path`."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize


_REASONS = {
    errno.ENOSPC: "no space left on the disk of the model store",
    errno.EDQUOT: "the disk quota of the model store is used up",
    errno.EROFS: "the model store is on a read-only file system",
    errno.EACCES: "no permission for the model store",
    errno.EPERM: "no permission for the model store",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
}


@contextmanager
def explained(action: str) -> Iterator[None]:
    """Turns an OSError into a StoreError that says what could not be done and why, without naming paths."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
        raise StoreError(f"cannot {action}: {reason}") from error


def write_all(fs: FileOps, fd: int, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
    """Writes everything, however short the single writes are."""
    view = memoryview(data).cast("B")
    while view:
        written = fs.write(fd, view, offset)
        if written <= 0:
            raise OSError(errno.EIO, "write made no progress")
        view, offset = view[written:], offset + written


def make_dirs(fs: FileOps, root: Path, parts: tuple[str, ...] = ()) -> Path:
    """`root` and the folders below it, each made durable in its parent. Folders are private (0700)."""
    missing = [path for path in [*reversed(root.parents), root] if not path.exists()]
    path = root
    for part in parts:
        path = path / part
        if not path.exists():
            missing.append(path)
    for folder in missing:
        try:
            fs.mkdir(folder)
        except FileExistsError:
            continue
        fs.fsync_dir(folder.parent)
    return path
