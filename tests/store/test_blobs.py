"""Blobs: digests, writing, importing, space, names."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollamapy.errors import BadRequest, NotFound, OllamapyError, StoreError
from ollamapy.store.blobs import BlobStore
from ollamapy.store.digest import Digest
from ollamapy.store.files import CHUNK
from ollamapy.store.fsops import FileOps
from tests.store.hostile import HOSTILE
from tests.store.stores import leftovers

HEX = hashlib.sha256(b"abc").hexdigest()


@pytest.fixture
def blobs(memory: Path) -> BlobStore:
    return BlobStore(memory / "models")


@pytest.mark.parametrize("text", [f"sha256:{HEX}", f"sha256-{HEX}", f"sha256:{HEX.upper()}"])
def test_digest_forms(text: str) -> None:
    digest = Digest.parse(text)
    assert (digest.text, digest.file_name) == (f"sha256:{HEX}", f"sha256-{HEX}")
    assert digest == Digest.of(b"abc") == Digest.from_hash(hashlib.sha256(b"abc"))


def test_digest_cannot_be_made_from_text() -> None:
    with pytest.raises(TypeError):
        Digest("../../etc/passwd")


def test_add_and_read(blobs: BlobStore) -> None:
    digest, created = blobs.add(b"abc")
    assert created and blobs.add(b"abc") == (digest, False)
    assert blobs.path(digest).name == f"sha256-{HEX}"
    assert (blobs.read(digest, 3), blobs.size(digest), blobs.has(digest)) == (b"abc", 3, True)
    assert stat.S_IMODE(blobs.path(digest).stat().st_mode) == 0o444
    assert stat.S_IMODE(blobs.folder.stat().st_mode) == 0o700
    with pytest.raises(StoreError, match="larger than 2 bytes"):
        blobs.read(digest, 2)
    with pytest.raises(StoreError, match=r"cannot read blob sha256-000000000000: No such file"):
        blobs.read(Digest.parse("sha256:" + "0" * 64), 3)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, CHUNK + 1])
def test_ingest(blobs: BlobStore, size: int) -> None:
    data = os.urandom(size)
    with blobs.ingest(Digest.of(data), size=size) as writer:
        for start in range(0, size, 700_001):
            writer.write(data[start : start + 700_001])
    assert writer.digest == Digest.of(data) and writer.size == size
    assert blobs.path(writer.digest).read_bytes() == data


def test_ingest_of_other_content(blobs: BlobStore) -> None:
    expected, got = Digest.of(b"expected"), Digest.of(b"got")
    with (
        pytest.raises(BadRequest, match=f'digest mismatch, expected "{expected}", got "{got}"'),
        blobs.ingest(expected) as writer,
    ):
        writer.write(b"got")
    assert not blobs.has(expected) and not blobs.has(got) and list(blobs.folder.iterdir()) == []


def test_abandoned_ingest_leaves_nothing(blobs: BlobStore) -> None:
    with pytest.raises(KeyboardInterrupt), blobs.ingest() as writer:
        writer.write(b"half")
        raise KeyboardInterrupt
    assert list(blobs.folder.iterdir()) == []


def test_a_blob_appears_only_when_whole(blobs: BlobStore) -> None:
    digest = Digest.of(b"ab")
    with blobs.ingest(digest) as writer:
        writer.write(b"a")
        assert not blobs.has(digest) and list(blobs.digests()) == []
        writer.write(b"b")
    assert list(blobs.digests()) == [digest]


def test_damaged_blobs_are_seen_and_healed(blobs: BlobStore) -> None:
    digest, _ = blobs.add(b"abc")
    for damage in (b"abd", b"ab", b"", b"abcd"):
        os.chmod(blobs.path(digest), 0o644)
        blobs.path(digest).write_bytes(damage)
        assert not blobs.verify(digest)
        with pytest.raises(StoreError, match=r"damaged|larger"):
            blobs.read(digest, 3)
        assert blobs.add(b"abc") == (digest, True)
        assert blobs.verify(digest)


def test_every_flipped_bit_is_found(blobs: BlobStore) -> None:
    data = bytes(range(100))
    digest, _ = blobs.add(data)
    path = blobs.path(digest)
    os.chmod(path, 0o644)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert not blobs.verify(digest), bit


class Recorder(FileOps):
    def __init__(self, copy_errno: int = 0) -> None:
        self.calls: list[str] = []
        self.copy_errno = copy_errno
        self.free = 1 << 40

    def link(self, source: Path, target: Path) -> None:
        self.calls.append("link")
        super().link(source, target)

    def copy_range(self, source: int, target: int, count: int, offset: int) -> int:
        self.calls.append("copy_range")
        if self.copy_errno:
            raise OSError(self.copy_errno, os.strerror(self.copy_errno))
        return super().copy_range(source, target, min(count, 1_000_003), offset)  # short, as the kernel may

    def create(self, path: Path) -> int:
        self.calls.append("create")
        return super().create(path)

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        self.calls.append("write")
        return super().write(fd, data, offset)

    def free_bytes(self, path: Path) -> int:
        return self.free


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "my model.gguf"
    path.write_bytes(os.urandom(2 * CHUNK + 12345))
    return path


@pytest.mark.parametrize("copy_errno", [0, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_import_copies(tmp_path: Path, source: Path, copy_errno: int) -> None:
    fs = Recorder(copy_errno)
    blobs = BlobStore(tmp_path / "models", fs)
    before, data, steps = source.stat(), source.read_bytes(), list[tuple[int, int]]()
    digest = blobs.import_file(source, progress=lambda done, total: steps.append((done, total)))
    assert blobs.path(digest).read_bytes() == data and digest == Digest.of(data)
    assert not blobs.path(digest).samefile(source)
    after = source.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_ino, after.st_nlink) == (
        before.st_mode,
        before.st_mtime_ns,
        before.st_ino,
        1,
    )
    assert steps == sorted(steps) and steps[-1] == (len(data), len(data))
    assert ("write" in fs.calls) is bool(copy_errno) and "link" not in fs.calls


def test_import_links_what_nobody_can_write(tmp_path: Path, source: Path) -> None:
    source.chmod(0o444)
    fs = Recorder()
    blobs = BlobStore(tmp_path / "models", fs)
    digest = blobs.import_file(source)
    assert blobs.path(digest).samefile(source) and fs.calls == ["link"] and digest == Digest.of(source.read_bytes())
    assert blobs.import_file(source) == digest and leftovers(blobs.root) == []
    assert stat.S_IMODE(source.stat().st_mode) == 0o444


def test_import_falls_back_when_linking_is_refused(tmp_path: Path, source: Path) -> None:
    class NoLinks(Recorder):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "no links here")

    source.chmod(0o444)
    blobs = BlobStore(tmp_path / "models", NoLinks())
    digest = blobs.import_file(source)
    assert not blobs.path(digest).samefile(source) and blobs.verify(digest)


def test_import_checks_the_expected_hash(blobs: BlobStore, source: Path) -> None:
    for mode in (0o644, 0o444):
        source.chmod(mode)
        with pytest.raises(BadRequest, match="digest mismatch"):
            blobs.import_file(source, Digest.of(b"other"))
        assert list(blobs.folder.iterdir()) == [] and source.exists()


def test_import_follows_links_to_files(blobs: BlobStore, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    source.chmod(0o444)
    assert blobs.verify(blobs.import_file(tmp_path / "link"))


def test_import_of_a_file_that_changes(blobs: BlobStore, source: Path) -> None:
    def grow(done: int, total: int) -> None:
        with open(source, "ab") as file:
            file.write(b"x")

    with pytest.raises(BadRequest, match="changed while it was read"):
        blobs.import_file(source, progress=grow)
    assert list(blobs.folder.iterdir()) == []


def test_import_of_no_regular_file(blobs: BlobStore, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "sock"))
    unix.close()
    for path in (tmp_path / "fifo", tmp_path / "sock", tmp_path, Path("/dev/zero"), Path("/dev/random")):
        with pytest.raises(BadRequest):
            blobs.import_file(path)
    with pytest.raises(NotFound, match="gone: no such file"):
        blobs.import_file(tmp_path / "gone")


def test_space_is_checked_first(tmp_path: Path, source: Path) -> None:
    fs = Recorder()
    fs.free = 1000
    blobs = BlobStore(tmp_path / "models", fs)
    with pytest.raises(StoreError, match=r"not enough space.*1001 bytes are needed, 1000 are free"):
        blobs.ingest(size=1001)
    with pytest.raises(StoreError, match="not enough space"):
        blobs.import_file(source)
    assert "create" not in fs.calls
    blobs.add(b"x" * 1000)
    fs.free = (64 << 20) + (1 << 30) - 1
    with pytest.raises(StoreError, match="not enough space"):
        blobs.check_space(64 << 20)
    fs.free += 1
    blobs.check_space(64 << 20)


def test_old_names_and_stale_files(blobs: BlobStore) -> None:
    digest, _ = blobs.add(b"abc")
    os.rename(blobs.path(digest), blobs.folder / f"sha256:{HEX}")
    for stale in ("sha256-12", f"sha256-{HEX}-partial", f"sha256-{HEX}-partial-0", ".new-x", "note"):
        (blobs.folder / stale).write_bytes(b"")
        os.utime(blobs.folder / stale, (1, 1))
    (blobs.folder / ".new-fresh").write_bytes(b"")
    (blobs.folder / "folder").mkdir()
    blobs.repair_names()
    assert blobs.verify(digest)
    assert blobs.remove_stale(3600) == 5
    assert sorted(path.name for path in blobs.folder.iterdir()) == [".new-fresh", "folder", f"sha256-{HEX}"]


def test_writers_in_many_threads(blobs: BlobStore) -> None:
    data = [os.urandom(5000) for _ in range(4)]

    def write(index: int) -> None:
        for _ in range(10):
            blobs.add(data[index % 4])

    threads = [threading.Thread(target=write, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(blobs.digests()) == {Digest.of(one) for one in data} and all(map(blobs.verify, blobs.digests()))
    assert leftovers(blobs.root) == []


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:30]))
def test_hostile_digests_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="invalid digest format"):
        Digest.parse(text)


@given(st.text(max_size=80) | st.text(st.sampled_from("sha256:-0123456789abcdefF./\n"), max_size=80))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_parses_is_a_plain_file_name(blobs: BlobStore, text: str) -> None:
    try:
        digest = Digest.parse(text)
    except OllamapyError:
        return
    assert blobs.path(digest).parent == blobs.folder and len(blobs.path(digest).name) == 71
