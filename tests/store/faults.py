"""File operations that fail, or stop for ever, at a chosen moment; and ones that remember what a power cut may undo."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ollamapy.store.fsops import FileOps

CHANGES = ("create", "write", "copy_range", "fsync", "chmod", "rename", "link", "unlink", "mkdir", "rmdir", "fsync_dir")


class Crash(BaseException):
    """The process died here."""


class Faults(FileOps):
    """Counts the operations that change something; at number `at` (from 0) does what `fault` says.

    fault: "crash" (before the operation), "torn" (half of a write, or all of another operation, and then a crash), or an
    errno, which is raised once, or from then on if `lasting`.
    """

    def __init__(self, at: int, fault: str | int, lasting: bool = False) -> None:
        self.at, self.fault, self.lasting = at, fault, lasting
        self.count = 0
        self.fired = ""

    def __getattribute__(self, attribute: str) -> Any:
        method = super().__getattribute__(attribute)
        if attribute not in CHANGES:
            return method
        return lambda *args: self._run(attribute, method, args)

    def _run(self, operation: str, method: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        number, self.count = self.count, self.count + 1
        if number < self.at or (number > self.at and not self.lasting and isinstance(self.fault, int)):
            return method(*args)
        if number == self.at:
            self.fired = operation
            if self.fault == "torn":
                _torn(operation, method, args)
        if isinstance(self.fault, int):
            raise OSError(self.fault, os.strerror(self.fault))
        raise Crash


def _torn(operation: str, method: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if operation == "write":
        fd, data, offset = args
        args = (fd, data[: len(data) // 2], offset)
    method(*args)


class ShortWrites(FileOps):
    """Writes at most three bytes at a time."""

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        return super().write(fd, data[:3], offset)


class Step(NamedTuple):
    """`inode` numbers files as they are made; `data` is (offset, bytes)."""

    kind: str
    path: str = ""
    target: str = ""
    inode: int = -1
    data: tuple[int, bytes] = (0, b"")


class Recorder(FileOps):
    """Does everything, and writes it down in `steps` with paths relative to `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.steps = root, list[Step]()
        self._inodes: dict[int, int] = {}  # descriptor -> our number
        self._paths: dict[str, int] = {}

    def mark(self, text: str) -> None:
        self.steps.append(Step("mark", text))

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    def create(self, path: Path) -> int:
        fd = super().create(path)
        inode = self._inodes[fd] = self._paths[self._relative(path)] = len(self.steps)
        self.steps.append(Step("create", self._relative(path), inode=inode))
        return fd

    def write(self, fd: int, data: memoryview, offset: int) -> int:
        written = super().write(fd, data, offset)
        self.steps.append(Step("write", inode=self._inodes[fd], data=(offset, bytes(data[:written]))))
        return written

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self.steps.append(Step("fsync", inode=self._inodes[fd]))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        inode = self._paths[self._relative(target)] = self._paths.pop(self._relative(source))
        self.steps.append(Step("rename", self._relative(source), self._relative(target), inode))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._paths.pop(self._relative(path), None)
        self.steps.append(Step("unlink", self._relative(path)))

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.steps.append(Step("mkdir", self._relative(path)))

    def rmdir(self, path: Path) -> None:
        super().rmdir(path)
        self.steps.append(Step("rmdir", self._relative(path)))

    def fsync_dir(self, path: Path) -> None:
        super().fsync_dir(path)
        self.steps.append(Step("fsync_dir", self._relative(path)))


def after_power_cut(steps: list[Step], rng: random.Random) -> tuple[set[str], dict[str, bytes]]:
    """Folders and files as a disk may have them after these steps and a power cut.

    What fsync covers is there. Of the rest, each write (or a part of it) and each change of a folder may be there or not.
    """
    synced = {  # index of a step -> whether a later step makes it durable
        index: any(_covers(later, step) for later in steps[index + 1 :]) for index, step in enumerate(steps)
    }
    contents: dict[int, bytearray] = {}
    folders, files = {"."}, dict[str, int]()
    luck = rng.choice((0.0, 0.3, 0.7, 1.0))
    for index, step in enumerate(steps):
        lasts = synced[index] or rng.random() < luck
        if step.kind == "write" and lasts:
            offset, data = step.data
            kept = data if synced[index] else data[: rng.randint(0, len(data))]
            content = contents.setdefault(step.inode, bytearray())
            content.extend(b"\0" * (offset + len(kept) - len(content)))
            content[offset : offset + len(kept)] = kept
        elif step.kind == "mkdir" and lasts and os.path.dirname(step.path) in {*folders, ""}:
            folders.add(step.path)
        elif step.kind == "create" and lasts and (os.path.dirname(step.path) or ".") in folders:
            files[step.path] = step.inode
        elif step.kind == "rename" and lasts and (os.path.dirname(step.target) or ".") in folders:
            files[step.target] = step.inode
            files.pop(step.path, None)
        elif step.kind == "unlink" and lasts:
            files.pop(step.path, None)
        elif step.kind == "rmdir" and lasts and not any(os.path.dirname(other) == step.path for other in {*files, *folders}):
            folders.discard(step.path)
    return folders, {path: bytes(contents.get(inode, b"")) for path, inode in files.items()}


def _covers(sync: Step, step: Step) -> bool:
    if step.kind == "write":
        return sync.kind == "fsync" and sync.inode == step.inode
    changed = step.target if step.kind == "rename" else step.path
    return sync.kind == "fsync_dir" and sync.path == (os.path.dirname(changed) or ".")
