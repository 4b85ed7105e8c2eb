"""How the tests of this package reach the fake engines of `fake_forkserver`, and look at processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from ollamapy.engine.protocol import SamplingParams
from ollamapy.lifecycle.process import EngineProcess
from tests.lifecycle.fake_forkserver import Faults

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_forkserver.py")))


def write_faults(path: Path, **faults: Any) -> Path:
    path.write_bytes(msgspec.json.encode(Faults(**faults)))
    return path


async def collect(engine: EngineProcess, max_tokens: int, prompt: int = 3) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate([0] * prompt, SamplingParams(max_tokens=max_tokens)):
        tokens += output.token_ids
    return tokens


def exists(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until it held; fails when it does not within `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.005)
    return time.monotonic() - start


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
