"""Blobs: immutable files named by their hash. Knows nothing of models.

A blob gets its name last: temporary file in the same folder -> write -> length and hash check -> fsync -> read-only ->
rename -> fsync of the folder. So a file with a digest's name has that digest's content, whatever was killed when.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ollamapy.errors import BadRequest, NotFound, StoreError
from ollamapy.store.digest import Digest
from ollamapy.store.files import CHUNK, Progress, hash_file, hash_open, older, opened
from ollamapy.store.fsops import FileOps, explained, make_dirs, write_all

RESERVE = 1 << 30  # bytes left free by writes of LARGE or more
LARGE = 64 << 20
_TEMPORARY = ".new-"
_NO_COPY_RANGE = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class BlobWriter:
    """A blob being written. Leaving the context without an error gives it its name; `digest` and `size` are set then."""

    def __init__(self, store: BlobStore, expected: Digest | None) -> None:
        self._store, self._fs, self._expected = store, store.fs, expected
        self._path = store.temporary()
        self._hash = hashlib.sha256()
        self._fd = -1
        self.size = 0
        self.digest: Digest | None = None

    def __enter__(self) -> BlobWriter:
        with explained("write a blob"):
            self._fd = self._fs.create(self._path)
        return self

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        with explained("write a blob"):
            write_all(self._fs, self._fd, chunk, self.size)
        self._hash.update(chunk)
        self.size += len(chunk)

    def copy_from(self, source: int, count: int) -> bool:
        """Copies within the kernel from the same offset of another file; False where the kernel cannot."""
        try:
            copied = self._fs.copy_range(source, self._fd, count, self.size)
        except OSError as error:
            if error.errno in _NO_COPY_RANGE:
                return False
            raise
        arrived = os.pread(self._fd, copied, self.size)
        if len(arrived) != copied:
            raise OSError(errno.EIO, "copied bytes cannot be read back")
        self._hash.update(arrived)
        self.size += copied
        return copied > 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            if self.digest is None:
                self._discard()

    def _commit(self) -> None:
        digest = Digest.from_hash(self._hash)
        if self._expected is not None and digest != self._expected:
            raise BadRequest(f'digest mismatch, expected "{self._expected}", got "{digest}"')
        with explained("write a blob"):
            if os.fstat(self._fd).st_size != self.size:
                raise StoreError(f"cannot write a blob: {self.size} bytes were written, the file differs")
            self._fs.fsync(self._fd)
            self._fs.chmod(self._fd, 0o444)
            fd, self._fd = self._fd, -1
            self._fs.close(fd)
            self._store._publish(self._path, digest)
        self.digest = digest

    def _discard(self) -> None:
        with suppress(OSError):  # the error that led here is the one to report
            if self._fd >= 0:
                self._fs.close(self._fd)
        with suppress(OSError):
            self._fs.unlink(self._path)


class BlobStore:
    """The folder `blobs/` of a model store. `hold` is told of each blob before it gets its name or is found to have it."""

    def __init__(self, root: Path, fs: FileOps | None = None, hold: Callable[[Digest], None] = lambda digest: None) -> None:
        self.root, self.folder, self.hold = root, root / "blobs", hold
        self.fs = fs or FileOps()
        self.reserve = RESERVE

    def path(self, digest: Digest) -> Path:
        """Where the blob is or would be: the one place where a blob's path is made."""
        return self.folder / digest.file_name

    def temporary(self) -> Path:
        """A new name in the same folder; a file left under it is removed by a later `remove_stale`."""
        return self.folder / f"{_TEMPORARY}{secrets.token_hex(8)}"

    def size(self, digest: Digest) -> int | None:
        """Bytes of the blob, None when it is not there."""
        try:
            status = os.stat(self.path(digest), follow_symlinks=True)
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def has(self, digest: Digest) -> bool:
        return self.size(digest) is not None

    def read(self, digest: Digest, limit: int) -> bytes:
        """The whole blob. StoreError when it is missing, longer than `limit`, or not what its name says."""
        with explained(f"read blob {digest.file_name[:19]}"):
            data = self.fs.read(self.path(digest), limit + 1)
        if len(data) > limit:
            raise StoreError(f"blob {digest.file_name[:19]} is larger than {limit} bytes")
        if Digest.of(data) != digest:
            raise StoreError(f"blob {digest.file_name[:19]} is damaged: its content does not have this hash")
        return data

    def verify(self, digest: Digest) -> bool:
        """Whether the blob is there and has the content its name says. Reads all of it."""
        try:
            return hash_file(self.path(digest)) == digest
        except (OSError, NotFound, BadRequest):
            return False

    def add(self, data: bytes) -> tuple[Digest, bool]:
        """Stores a small blob; says too whether it was new. An existing one is compared, and replaced if damaged."""
        digest = Digest.of(data)
        self.hold(digest)
        if self.size(digest) == len(data) and self.verify(digest):
            return digest, False
        with self.ingest(digest, size=len(data)) as writer:
            writer.write(data)
        return digest, True

    def ingest(self, expected: Digest | None = None, *, size: int | None = None) -> BlobWriter:
        """A context manager to write a blob; BadRequest at its end if the hash is not `expected`.

        With `size`, free space is checked first (StoreError); large blobs must leave `reserve` bytes.
        """
        with explained("write a blob"):
            make_dirs(self.fs, self.root, ("blobs",))
            if size is not None:
                self.check_space(size)
        return BlobWriter(self, expected)

    def import_file(self, source: Path, expected: Digest | None = None, progress: Progress | None = None) -> Digest:
        """Takes a local file in, without changing or moving it. Its hash is always computed, from the bytes stored.

        A file that nobody may write, and that is ours, is hard-linked; any other is copied, in the kernel where that
        works (which shares the blocks on file systems that can).
        """
        with opened(source) as fd, explained("write a blob"):
            status = os.fstat(fd)
            make_dirs(self.fs, self.root, ("blobs",))
            if not status.st_mode & 0o222 and status.st_uid == os.geteuid():
                linked = self._link(source, fd, expected, progress)
                if linked is not None:
                    return linked
            self.check_space(status.st_size)
            with BlobWriter(self, expected) as writer:
                _copy(self.fs, fd, writer, status.st_size, progress)
                after = os.fstat(fd)
                if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
                    raise BadRequest(f"{source.name} changed while it was read")
        assert writer.digest is not None
        return writer.digest

    def import_made(self, make: Callable[[Path], None], action: str) -> Digest:
        """Takes in the file that `make` writes to the path it is given. `action`: what is said to have failed where it does."""
        temporary = self.temporary()
        with explained(action):
            try:
                make(temporary)
                os.chmod(temporary, 0o444)  # so that it is linked, not copied
                return self.import_file(temporary)
            finally:
                temporary.unlink(missing_ok=True)

    def delete(self, digest: Digest) -> int:
        """Removes the blob if it is there; returns the bytes freed. The caller has made sure that nothing needs it."""
        size = self.size(digest)
        if size is None:
            return 0
        with explained("remove a blob"), suppress(FileNotFoundError):
            self.fs.unlink(self.path(digest))
        return size

    def digests(self) -> Iterator[Digest]:
        """Of all blobs that are there."""
        for entry in self._entries():
            with suppress(BadRequest):
                if entry.name.startswith("sha256-"):
                    yield Digest.parse(entry.name)

    def repair_names(self) -> None:
        """Renames `sha256:x`, the form of Ollama before 0.1.33, to `sha256-x`."""
        for entry in self._entries():
            if entry.name.startswith("sha256:"):
                with suppress(BadRequest), explained("rename a blob"):
                    self.fs.rename(Path(entry.path), self.path(Digest.parse(entry.name)))

    def remove_stale(self, age: float) -> int:
        """Removes files that are no blobs (left by killed writers) and older than `age` seconds; returns how many."""
        removed = 0
        for entry in self._entries():
            try:
                Digest.parse(entry.name)
            except BadRequest:
                with suppress(OSError):  # gone meanwhile, or not ours
                    if entry.is_file(follow_symlinks=False) and older(entry.stat(follow_symlinks=False), age):
                        self.fs.unlink(Path(entry.path))
                        removed += 1
        return removed

    def older(self, digest: Digest, age: float) -> bool:
        """Whether the blob was written more than `age` seconds ago."""
        try:
            return older(os.stat(self.path(digest)), age)
        except OSError:
            return False

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.folder) as entries:
                return list(entries)
        except FileNotFoundError:
            return []

    def _publish(self, temporary: Path, digest: Digest) -> None:
        self.hold(digest)
        self.fs.rename(temporary, self.path(digest))
        self.fs.fsync_dir(self.folder)

    def check_space(self, size: int) -> None:
        """StoreError when that many bytes do not fit; LARGE ones must leave `reserve`."""
        free = self.fs.free_bytes(self.folder)
        needed = size + (self.reserve if size >= LARGE else 0)
        if needed > free:
            raise StoreError(f"not enough space on the disk of the model store: {needed} bytes are needed, {free} are free")

    def _link(self, source: Path, fd: int, expected: Digest | None, progress: Progress | None) -> Digest | None:
        """The digest, or None when the file cannot be linked (other file system, not allowed)."""
        temporary = self.temporary()
        try:
            self.fs.link(source.resolve(), temporary)
        except OSError:
            return None
        published = False
        try:
            if not os.path.samestat(os.stat(temporary), os.fstat(fd)):
                return None
            digest = hash_open(fd, os.fstat(fd).st_size, progress)
            if expected is not None and digest != expected:
                raise BadRequest(f'digest mismatch, expected "{expected}", got "{digest}"')
            self.fs.fsync(fd)
            if self.size(digest) is not None and os.path.samestat(os.stat(temporary), os.stat(self.path(digest))):
                self.hold(digest)
                return digest  # rename of one name of a file onto another does nothing
            self._publish(temporary, digest)
            published = True
            return digest
        finally:
            if not published:
                with suppress(OSError):
                    self.fs.unlink(temporary)


def _copy(fs: FileOps, fd: int, writer: BlobWriter, size: int, progress: Progress | None) -> None:
    """Copies in the kernel, hashing what arrived; through this process where the kernel cannot."""
    in_kernel = True
    while writer.size < size:
        count = min(CHUNK, size - writer.size)
        in_kernel = in_kernel and writer.copy_from(fd, count)
        if not in_kernel:
            chunk = os.pread(fd, count, writer.size)
            if not chunk:
                break  # shorter than it was: the caller reports the change
            writer.write(chunk)
        if progress is not None:
            progress(writer.size, size)
