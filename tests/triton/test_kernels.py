"""Runs the proofs of the Triton kernels, each in a process of its own: interpreted against the reference, then compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*command: str, **environment: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    clean.update(environment)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=clean, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-12000:]


@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("check_*.py")))
def test_interpreted(file: str) -> None:
    run("-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / file), TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled() -> None:
    """Nothing spills, tensor cores are used, and no figure has grown: see compiled.py."""
    run("-m", "tests.triton.compiled", OMP_NUM_THREADS="1", TRITON_CACHE_DIR=str(ROOT / ".cache" / "triton"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_compiled() -> None:
    run("-m", "tests.triton.compiled", "--all", OMP_NUM_THREADS="1", TRITON_CACHE_DIR=str(ROOT / ".cache" / "triton"))
