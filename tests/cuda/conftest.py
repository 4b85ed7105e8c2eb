"""Where the checks of this folder run: on the library that CUDA_CHECK_LIBRARY names, whose kernels run on the CPU, under every
schedule; else on a GPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tests.triton.conftest  # noqa: F401  (makes ollamapy.triton_kernels importable)
from ollamapy import cuda_extension

LIBRARY = os.environ.get("CUDA_CHECK_LIBRARY", "")
SCHEDULES = ["first-late", "first-eager", "last-late", "last-eager"] if LIBRARY else ["gpu"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Of the kernels."""
    if LIBRARY:
        cuda_extension.use(Path(LIBRARY))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert cuda_extension.load() is not None, cuda_extension.status()
    return torch.device("cuda")


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """Which warp runs first, and when asynchronous copies land."""
    if not LIBRARY:
        yield "gpu"
        return
    set_schedule = ctypes.CDLL(LIBRARY).cuda_on_cpu_schedule
    order, copies = str(request.param).split("-")
    set_schedule(int(order == "last"), int(copies == "eager"))
    yield str(request.param)
    set_schedule(0, 0)
