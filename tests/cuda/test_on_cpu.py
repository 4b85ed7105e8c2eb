"""Runs the checks of the CUDA kernels on the CPU, in processes of their own: all of them as they are, some under sanitizers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ollamapy import _build
from tests.csrc.sanitize import preload
from tests.cuda import on_cpu

ROOT = Path(__file__).parents[2]
FILES = ("tests/cuda/check_linear.py", "tests/cuda/check_elementwise.py")


def compiler() -> str:
    try:
        return _build.find_compiler()
    except _build.BuildError as missing:
        pytest.skip(str(missing))


def run_checks(library: Path, *files: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "CUDA_CHECK_LIBRARY": str(library), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-s", "-m", "gpu", *(files or FILES)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=280)


def sanitized(library: Path) -> subprocess.CompletedProcess[str]:
    environment = {"LD_PRELOAD": preload(compiler()), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return run_checks(library, *FILES, "-k", "not more_rows", **environment)  # 65,536 blocks: a minute


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler()
    return on_cpu.build(tmp_path_factory.mktemp("cuda"))


def test_checks_pass_on_the_cpu(library: Path) -> None:
    done = run_checks(library)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_models_run_on_the_cpu(library: Path) -> None:
    """Whole models: these kernels, and Triton's interpreted ones for what they do not do."""
    done = run_checks(library, "tests/cuda/check_model.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "forms", [("Q5_0", "Q6_K"), pytest.param(("Q2_K", "Q3_K", "Q4_K", "Q8_0", "IQ4_XS"), marks=pytest.mark.slow)], ids="-".join
)
def test_checks_pass_under_sanitizers(forms: tuple[str, ...], tmp_path: Path) -> None:
    compiler()
    library = on_cpu.build(tmp_path, extra=on_cpu.SANITIZE, forms=forms)
    assert b"__asan_report_load" in library.read_bytes(), "built without the sanitizers"
    done = sanitized(library)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
