"""These tests say themselves which kernels they want; what a module chose does not reach the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ollamapy import ops


@pytest.fixture(autouse=True)
def _reference_kernels() -> Iterator[None]:
    ops.choose(torch.device("cpu"), "reference")
    yield
    ops.choose(torch.device("cpu"))
