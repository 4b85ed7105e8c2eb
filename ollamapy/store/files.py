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


_WEIGHTS = (
    ("model*.safetensors", "*/model*.safetensors"),
    ("consolidated*.safetensors",),
    ("adapter_model.safetensors",),
    ("pytorch_model*.bin",),
    ("consolidated*.pth",),
    ("*.gguf",),
    ("*.bin",),
)
"""The files of a folder that are a model's weights: the first row that matches any."""

_BESIDE = ("*.json", "*/*.json", "chat_template.jinja", "tokenizer.model", "*/tokenizer.model")


def model_files(path: Path) -> dict[str, Path]:
    """Relative name -> file: the path itself under its own name, or the model's files in a folder. The configuration of an
    adapter goes with it.

    Raises NotFound where a folder has none, BadRequest for links that lead out of it and for files whose content is
    not what their name says (most often a git-LFS pointer).
    """
    if not path.is_dir():
        config = path.parent / "adapter_config.json"
        beside = [config] if path.suffix == ".safetensors" and config.is_file() else []
        return {file.name: file for file in (path, *beside)}
    weights: list[Path] = next(filter(None, (_matches(path, patterns) for patterns in _WEIGHTS)), [])
    if not weights:
        raise NotFound("no Modelfile or safetensors files found")
    root, files = path.resolve(), dict[str, Path]()
    for file in [*weights, *_matches(path, _BESIDE)]:
        name = file.relative_to(path).as_posix()
        if not file.resolve().is_relative_to(root):
            raise BadRequest(f"insecure path: {name}")
        _check_content(file, name)
        files[name] = file
    return files


def _matches(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [file for pattern in patterns for file in sorted(folder.glob(pattern)) if file.is_file()]


def _check_content(file: Path, name: str) -> None:
    with opened(file) as fd:
        head = os.pread(fd, 512, 0)
    text = not any(byte < 32 and byte not in b"\t\n\f\r\x1b" for byte in head)
    expected = ""
    if file.suffix in (".json", ".jinja"):
        expected = "" if text else "text/plain"
    elif name.startswith(("pytorch_model", "consolidated")) and file.suffix != ".safetensors":
        expected = "" if head.startswith(b"PK\x03\x04") else "application/zip"
    elif file.suffix in (".bin", ".gguf", ".model"):
        expected = "application/octet-stream" if text else ""
    if expected:
        raise BadRequest(f"invalid content type: expected {expected} for {name}")
