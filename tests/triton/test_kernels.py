"""Runs the proofs of the Triton kernels, each in a process of its own: interpreted against the reference, then compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*command: str, **environment: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    with tempfile.TemporaryDirectory() as cache:  # a compilation that was cached proves nothing
        clean.update(environment, TRITON_CACHE_DIR=cache)
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    assert done.returncode == 0, done.stdout[-12000:]


@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("check_*.py")))
def test_interpreted(file: str) -> None:
    run("-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / file), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.timeout(400)
def test_compiled() -> None:
    """One case of each kernel: nothing spills, tensor cores are used, no figure has grown. 27 s on two quiet cores."""
    run("-m", "tests.triton.compiled", "--quick", OMP_NUM_THREADS="1")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("extent", [(), ("--all",)], ids=["usual", "all"])
def test_more_compiled(extent: tuple[str, ...]) -> None:
    run("-m", "tests.triton.compiled", *extent, OMP_NUM_THREADS="1")
