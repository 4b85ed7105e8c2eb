"""What errors say of themselves."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch

from ollamapy.errors import lacks_memory


@pytest.mark.parametrize("take", [
    lambda: bytearray(1 << 62), lambda: np.empty(1 << 48), lambda: torch.empty(1 << 48), lambda: mmap.mmap(-1, 1 << 50),
], ids=["Python", "numpy", "torch", "the system"])  # fmt: skip
def test_lack_of_memory_is_known(take: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as error:
        take()
    assert lacks_memory(error.value)


@pytest.mark.parametrize("error", [RuntimeError("shape"), FileNotFoundError(2, "x"), ValueError()])
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not lacks_memory(error)
