"""A GGUF file to a device: what its bytes take to be read, to be read and copied, and to become a model.

With `cold` the system is asked to forget the file first, so that it comes from the disk; else it comes from its memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import make_model
from ollamapy.gguf.reader import GGUFFile
from ollamapy.models import upload
from ollamapy.models.load import load_model


class HostLane:
    """An `upload.Lane` in the host's memory: `copies` or not. Without, an upload is the reads alone."""

    def __init__(self, copies: bool) -> None:
        self._copies = copies

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy(self, to: Tensor, source: Tensor) -> Callable[[], None]:
        if self._copies:
            to.copy_(source)
        return lambda: None

    def hand_over(self, tensor: Tensor) -> None:
        pass

    def close(self) -> None:
        pass


def forget(path: Path) -> None:
    """Has the system drop its copy of a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def uploaded(path: Path, lane: upload.Lane) -> None:
    with GGUFFile.open(path) as file:
        wanted = [[tensor] for tensor in file.tensors.values()]
        with upload.Upload(file, lane, wanted) as tensors:
            for _ in wanted:
                tensors.next()


def model(path: Path, device: torch.device, family: str) -> None:
    with GGUFFile.open(path) as file:
        load_model(file, device, kernels=family, context_length=1024)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(device: torch.device, path: Path, shape: make_model.Shape, row: Callable[..., None]) -> None:
    """Rows of seconds and GB/s of the file; the second of two warm runs counts."""
    start = time.perf_counter()
    make_model.make(path, shape, "Q4_K_M")
    row(made=path.name, mb=round(path.stat().st_size / 1e6), seconds=round(time.perf_counter() - start, 1))
    ways: dict[str, Callable[[], None]] = {
        "read": lambda: uploaded(path, HostLane(copies=False)),
        "upload": lambda: uploaded(path, upload.lane(device) or HostLane(copies=True)),
        "model": lambda: model(path, device, "csrc"),
        "model, triton": lambda: model(path, device, "csrc" if device.type == "cpu" else "triton"),
    }
    for way, work in ways.items():
        for cold in (False, True):
            try:
                for _ in range(1 if cold else 2):
                    if cold:
                        forget(path)
                    start = time.perf_counter()
                    work()
                    seconds = time.perf_counter() - start
            except Exception as problem:  # the other ways are still told
                row(load=way, cold=cold, failed=f"{type(problem).__name__}: {str(problem)[:300]}")
                continue
            row(load=way, cold=cold, seconds=round(seconds, 3), gbs=round(path.stat().st_size / seconds / 1e9, 2))
