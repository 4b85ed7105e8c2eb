"""Fixtures shared by all tests: real models (downloaded once into a cache), golden data, one torch thread."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data"

# A shell's background jobs have SIGINT ignored, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    """Two test processes on two cores must not spin against each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OLLAMAPY_PREFIX_CACHE_BYTES", "0")  # no test leaves files in the user's folder


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf: llama architecture, byte-level BPE."""
    from tests.real_models import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """gemma-3-270m-q4_k_m.gguf: gemma3, SentencePiece, sliding windows."""
    from tests.real_models import fetch

    return fetch("gemma3")


def golden(name: str) -> dict[str, Any]:
    """The golden JSON of `smollm2-135m` or `gemma3-270m`."""
    data: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return data
