"""Facts of the machine a figure was measured on, and its limits: reading memory, int8 dot products. Knows no model."""

from __future__ import annotations

import ctypes
import datetime
import functools
import os
import platform
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ollamapy import _build, extension
from ollamapy.lifecycle.devices import physical_cores

ROOT = Path(__file__).parent.parent
BUFFER = 1 << 30  # bytes read by the bandwidth probe: far beyond any cache
REPEATS = 5


def facts() -> dict[str, Any]:
    """CPU, memory, versions and commit, as JSON values."""
    return {
        "cpu": _cpu_model(),
        "cores": physical_cores(),
        "isa": extension.isa(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": load_average(),
    }


def load_average() -> float:
    """Of the last minute: what else ran on the machine shows in it."""
    return round(os.getloadavg()[0], 2)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def commit() -> str:
    """Of the tree that is measured, as it was at the first call; "-dirty" when it was edited since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def limits(threads: int) -> dict[str, float]:
    """read_gbs: GB/s that `threads` read of memory together; vnni_gmacs: 10^9 int8 multiply-adds/s; {} without a compiler."""
    library = _compile()
    if library is None:
        return {}
    buffer = np.ones(BUFFER, dtype=np.int8)
    share = BUFFER // threads // 256 * 256

    def read(index: int) -> int:
        library.read_lines(ctypes.c_void_p(buffer.ctypes.data + index * share), ctypes.c_int64(share // 64))
        return share

    def dot(index: int) -> int:
        done: int = library.dot_rounds(ctypes.c_int64(20_000_000))
        return done

    return {"read_gbs": _rate(read, threads) / 1e9, "vnni_gmacs": _rate(dot, threads) / 1e9}


def _rate(work: Callable[[int], int], threads: int) -> float:
    """Units of work a second that `threads` do together: the best of several, for a limit is what can be reached."""
    best = 0.0
    for _ in range(REPEATS):
        done = [0] * threads

        def run(index: int, done: list[int] = done) -> None:
            done[index] = work(index)

        team = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
        start = time.perf_counter()
        for thread in team:
            thread.start()
        for thread in team:
            thread.join()
        best = max(best, sum(done) / (time.perf_counter() - start))
    return best


def _compile() -> ctypes.CDLL | None:
    """The probes, built for this CPU; ctypes lets go of the interpreter's lock while they run."""
    if platform.machine() != "x86_64":
        return None
    with tempfile.TemporaryDirectory() as folder:
        target, source = Path(folder) / "probe.so", Path(__file__).with_name("probe.c")
        command = [_compiler(), "-x", "c", "-O3", "-march=native", "-shared", "-fPIC", "-o", str(target), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(str(target))
    library.read_lines.restype = library.dot_rounds.restype = ctypes.c_int64
    return library


def _compiler() -> str:
    try:
        return _build.find_compiler()
    except _build.BuildError:
        return "cc"
