"""PrefixStore: KV blocks of prompt prefixes in files, so that they outlive the engine. Knows bytes; no tensor, no scheduler.

A file holds the pages (one per layer group) of one block of a hash chain, and a keyed hash over all of it: what another hand
wrote, a cut or a crash left is not used but deleted and counted. The files tell what prompts said to whoever can read them:
they are made for the owner alone. One thread reads and writes; its queue is bounded, and no call here waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import secrets
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ollamapy.engine.prefix_reading import Buffers, Page, Pages, Reading

log = logging.getLogger(__name__)

MAGIC = b"olpykv01"
HEADER = struct.Struct("<8s16s16sQQ")  # magic, identity, digest, groups as bits, bytes of a page
MAC_BYTES = 32
MAX_QUEUED = 64 << 20  # bytes that wait to be written
MAX_FILE = 64 << 20
PAUSE = 60.0  # seconds without writes after one failed, as on a full disk
ABANDONED = 600.0  # seconds after which a temporary file is of nobody
KEPT = 0.9  # of the limit, when files are deleted because of it


class _Write(NamedTuple):
    digest: bytes
    pages: Pages


class PrefixStore:
    """Files of one model under `root`, which other models and processes share; `limit` bounds all of them, in bytes.

    `identity` says all that the content depends on besides the tokens: weights, kernels, cache type, layout. Raises OSError
    when the folder cannot be made.
    """

    def __init__(self, root: Path, limit: int, identity: str) -> None:
        self._root, self._limit = root, limit
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.key = _shared_key(root)
        self._identity = hashlib.blake2b(identity.encode(), digest_size=16, key=self.key).digest()
        self._folder = root / self._identity.hex()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._known: dict[bytes, int] = {}  # digest -> groups in its file, as bits
        for path in self._folder.glob("*.kv"):
            digest, groups = _named(path)
            self._known[digest] = max(groups, self._known.get(digest, 0), key=int.bit_count)
        self._lock = threading.Lock()
        self._queued = 0
        self._paused_until = 0.0
        self.num_written = self.num_bad = self.num_failed = 0
        self.num_bytes = 0  # of all models, as last seen
        self.buffers = Buffers()
        self._jobs: queue.SimpleQueue[Reading | _Write] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="prefix-store", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """Whether nothing can be offered now."""
        return self._queued >= MAX_QUEUED

    @property
    def is_paused(self) -> bool:
        """Whether writing has just failed, so that nothing should be offered for a while."""
        return time.monotonic() < self._paused_until

    def has(self, digest: bytes, groups: int) -> bool:
        """Whether there is a file with pages of these groups (bits)."""
        return self._known.get(digest, 0) & groups == groups

    def offer(self, digest: bytes, pages: Pages) -> bool:
        """Has pages written, soon. False when the queue is full."""
        size = sum(map(len, pages.values()))
        with self._lock:
            if self._queued + size > MAX_QUEUED:
                return False
            self._queued += size
        self._jobs.put(_Write(digest, pages))
        return True

    def read(self, digests: Sequence[bytes]) -> Reading:
        """Has the files of a chain read, as fast as its pages are taken."""
        reading = Reading(tuple(digests), self.buffers)
        self._jobs.put(reading)
        return reading

    def flush(self, seconds: float) -> bool:
        """Waits until what was offered is written; whether it was in time."""
        end = time.monotonic() + seconds
        while self._queued and time.monotonic() < end:
            time.sleep(0.002)
        return not self._queued

    def check(self) -> list[str]:
        """What is wrong; empty when nothing is."""
        problems = [] if self._thread.is_alive() else ["the thread of the prefix store has ended"]
        return problems if 0 <= self._queued <= MAX_QUEUED else [*problems, f"{self._queued} bytes wait in the prefix store"]

    # --- the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        self._make_room()
        while True:
            job = self._jobs.get()
            try:
                self._do(job)
            except Exception:  # the thread has to go on: requests wait for its answers
                log.exception("prefix cache: a file was not read or written")
                self.num_failed += 1
            finally:
                if isinstance(job, Reading):
                    job.put(None)

    def _do(self, job: Reading | _Write) -> None:
        if isinstance(job, Reading):
            self._read_chain(job)
            return
        try:
            self._write(job.digest, job.pages)
        finally:
            with self._lock:
                self._queued -= sum(map(len, job.pages.values()))

    def _path(self, digest: bytes, groups: int) -> Path:
        return self._folder / f"{digest.hex()}-{groups:x}.kv"

    def _write(self, digest: bytes, pages: Pages) -> None:
        """Temporary file, then rename; no fsync, because a file that a power cut leaves unfinished is found out by its hash."""
        if self.is_paused:
            return
        groups = sorted(pages)
        bits = sum(1 << group for group in groups)
        head = HEADER.pack(MAGIC, self._identity, digest, bits, len(pages[groups[0]]))
        temporary = self._folder / f"tmp-{secrets.token_hex(8)}"  # a pid may be that of one that crashed
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                hashed = hashlib.blake2b(head, digest_size=MAC_BYTES, key=self.key)
                file.write(head)
                for group in groups:
                    hashed.update(pages[group])
                    file.write(pages[group])
                file.write(hashed.digest())
                size = file.tell()
            os.replace(temporary, self._path(digest, bits))
        except OSError as error:
            log.warning("prefix cache: cannot write %s: %s; trying again in %.0f s", self._folder, error, PAUSE)
            self.num_failed += 1
            self._paused_until = time.monotonic() + PAUSE
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            return
        before = self._known.get(digest, bits)
        self._known[digest] = bits
        if before != bits:
            with contextlib.suppress(OSError):
                os.unlink(self._path(digest, before))
        self.num_written += 1
        self.num_bytes += size
        if self.num_bytes > self._limit:
            self._make_room()

    def _read_chain(self, reading: Reading) -> None:
        """Ends where a file is not there or no good."""
        for digest in reading.digests:
            path = self._path(digest, self._known.get(digest, 0))
            buffer = None
            try:
                os.utime(path)
                with open(path, "rb", buffering=0) as file:
                    size = min(os.fstat(file.fileno()).st_size, MAX_FILE)
                    buffer = self.buffers.take(size, reading)
                    if buffer is None:
                        return
                    start = time.perf_counter()
                    data = memoryview(buffer)[:size]
                    pages = self._parsed(digest, data) if file.readinto(data) == size and not file.read(1) else None
            except OSError:  # another process has made room
                pages = None
            else:
                if pages is None:
                    self._delete_bad(path)
            if pages is None or buffer is None:
                self._known.pop(digest, None)
                if buffer is not None:
                    self.buffers.give(buffer)
                return
            reading.num_bytes += size
            reading.seconds += time.perf_counter() - start
            reading.put(Page(digest, pages, buffer))

    def _delete_bad(self, path: Path) -> None:
        self.num_bad += 1
        log.warning("prefix cache: %s is damaged or of another make and is deleted", path.name)
        with contextlib.suppress(OSError):
            os.unlink(path)

    def _parsed(self, digest: bytes, data: memoryview) -> Pages | None:
        if len(data) < HEADER.size + MAC_BYTES:
            return None
        magic, identity, owner, groups, page_bytes = HEADER.unpack_from(data)
        count = int(groups).bit_count()
        size = HEADER.size + count * page_bytes + MAC_BYTES
        if (magic, identity, owner) != (MAGIC, self._identity, digest) or len(data) != size:
            return None
        content, mac = data[:-MAC_BYTES], data[-MAC_BYTES:]
        if not secrets.compare_digest(hashlib.blake2b(content, digest_size=MAC_BYTES, key=self.key).digest(), mac):
            return None
        numbers = [group for group in range(64) if groups >> group & 1]
        body = content[HEADER.size :]
        return {group: body[i * page_bytes : (i + 1) * page_bytes] for i, group in enumerate(numbers)}

    def _make_room(self) -> None:
        """Deletes what was not used for longest when there is more than the limit, and what crashes have left."""
        files: list[tuple[float, int, Path]] = []
        for path in self._root.glob("*/*"):
            with contextlib.suppress(OSError):  # another process is faster
                stat = path.stat()
                if path.suffix == ".kv":
                    files.append((stat.st_mtime, stat.st_size, path))
                elif path.name.startswith("tmp-") and time.time() - stat.st_mtime > ABANDONED:
                    path.unlink()
        self.num_bytes = sum(size for _, size, _ in files)
        if self.num_bytes <= self._limit:
            return
        for _, size, path in sorted(files):
            if self.num_bytes <= KEPT * self._limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            self.num_bytes -= size
            if path.parent == self._folder:
                self._known.pop(_named(path)[0], None)


def _named(path: Path) -> tuple[bytes, int]:
    """Digest and groups of a file by its name; nothing for a name that is not ours."""
    digest, _, groups = path.stem.partition("-")
    try:
        return bytes.fromhex(digest), int(groups, 16)
    except ValueError:
        return b"", 0


def _shared_key(root: Path) -> bytes:
    """The secret of this folder, made by whoever comes first: a link does not replace a file that is there."""
    path = root / "key"
    with contextlib.suppress(FileNotFoundError):
        if len(key := path.read_bytes()) == 32:
            return key
        path.unlink()
    temporary = root / f"tmp-{secrets.token_hex(8)}"
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
    return path.read_bytes()
