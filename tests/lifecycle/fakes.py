"""How the tests of this package reach the fake engines of `fake_forkserver`, and look at processes."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

from ollamapy.engine.protocol import SamplingParams
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from ollamapy.lifecycle.process import EngineProcess
from ollamapy.names import ModelName
from tests.lifecycle.fake_forkserver import Faults
from tests.tokenizer.builders import spm_metadata

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_forkserver.py")))


def write_faults(path: Path, **faults: Any) -> Path:
    path.write_bytes(msgspec.json.encode(Faults(**faults)))
    return path


def llama_keys() -> dict[str, float]:
    return {
        "context_length": 8192,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }


def write_model(path: Path, **faults: Any) -> Path:
    """A GGUF file with a header that the daemon believes and no weights; the fake engine reads its faults from it."""
    metadata = {
        "general.architecture": "llama",
        "general.description": msgspec.json.encode(Faults(**faults)).decode(),
        **{f"llama.{key}": value for key, value in llama_keys().items()},
        **spm_metadata({"▁a": -1.0, "b": -2.0}),
    }
    write_gguf(path, metadata, [("token_embd.weight", GGMLType.F32, (261, 64), bytes(4 * 261 * 64))])
    return path


@dataclass(frozen=True)
class FakeModel:
    """What `Residents` asks of a model."""

    name: ModelName
    digest: str
    model_path: Path | None
    adapter_paths: tuple[Path, ...] = ()
    draft_path: Path | None = None


def fake_model(folder: Path, name: str, **faults: Any) -> FakeModel:
    return FakeModel(ModelName.parse(name), f"digest-{name}", write_model(folder / f"{name}.gguf", **faults))


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


def descendants(pid: int) -> set[int]:
    """The processes below `pid`."""
    below: set[int] = set()
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return below
    for child in map(int, children):
        below |= {child, *descendants(child)}
    return below


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until it held; fails when it does not within `seconds`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.005)
    return time.monotonic() - start


def written(trace: Path) -> bool:
    """Whether a fake engine has written to its trace, to the end of a line."""
    return trace.exists() and trace.read_text().endswith("\n")


def open_fds() -> int:
    gc.collect()  # a traceback may hold a mapped file
    return len(os.listdir("/proc/self/fd"))
