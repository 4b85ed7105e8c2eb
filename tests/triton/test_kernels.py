"""Runs the proofs of the Triton kernels, each in a process of its own: interpreted against the reference, then compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.triton.conftest import carry_launches

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
_LONGEST = ("check_model.py", "check_weights.py")
FILES = sorted((path.name for path in HERE.glob("check_*.py")), key=lambda name: name not in _LONGEST)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*command: str, **environment: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    with tempfile.TemporaryDirectory() as cache:  # a compilation that was cached proves nothing
        clean.update(environment, TRITON_CACHE_DIR=cache)
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    assert done.returncode == 0, done.stdout[-12000:]


@pytest.fixture(scope="module")
def checks(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """The chosen files, two at a time: the interpreter knows one core."""

    def interpret(file: str) -> None:
        run("-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / file), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")

    chosen = [item for item in request.session.items if getattr(item, "originalname", "") == "test_interpreted"]
    with ThreadPoolExecutor(2) as pool:
        yield {(file := item.callspec.params["file"]): pool.submit(interpret, file) for item in chosen}  # type: ignore[attr-defined]
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str, checks: dict[str, Future[None]]) -> None:
    checks[file].result()


def test_launches_are_carried() -> None:
    """As natively on a GPU (here to other memory of the host): views of one memory stay so, and what is written comes back."""

    class Kernel:
        def run(self, floats: torch.Tensor, bits: torch.Tensor, *, tail: torch.Tensor, size: int) -> None:
            assert floats.untyped_storage().data_ptr() == bits.untyped_storage().data_ptr() != store.data_ptr()
            assert floats.stride() == (2,) and size == 4
            floats += 1
            tail.zero_()

    carry_launches(Kernel, "cpu")
    store = torch.arange(8.0)
    Kernel().run(store[2::2], store.view(torch.int32), tail=store[7:], size=4)
    assert store.tolist() == [0, 1, 3, 3, 5, 5, 7, 0]


@pytest.mark.timeout(900)
def test_compiled() -> None:
    """The kernels of the models most used: nothing spills, tensor cores are used, no figure has grown. A minute."""
    run("-m", "tests.triton.compiled", OMP_NUM_THREADS="1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_type_compiled() -> None:
    run("-m", "tests.triton.compiled", "--all", OMP_NUM_THREADS="1")
