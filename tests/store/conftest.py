"""A folder in memory for stores, and an empty one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ollamapy.store.library import Library


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: thousands of fsyncs that no test result depends on cost nothing there."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture
def library(memory: Path) -> Library:
    return Library(memory / "deep" / "models")
