"""nvcc's word on the CUDA kernels: no spilled registers, figures within the budget, a library that loads without a driver."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ollamapy import _build, _build_cuda
from tests.cuda import compiled

ROOT = Path(__file__).parents[2]
TORCH = Path(str(importlib.util.find_spec("torch").origin)).parent  # type: ignore[union-attr]


@pytest.fixture
def nvcc() -> str:
    try:
        return _build_cuda.find_nvcc("", TORCH)
    except _build.BuildError:
        pytest.skip("nvcc not installed")


def test_a_library_that_loads_without_a_driver(nvcc: str, tmp_path: Path) -> None:
    """One type for one architecture, linked with the bindings and loaded."""
    some = _build_cuda.kernels(ROOT / "csrc", ["Q4_K"])
    for name, rest in some.items():
        compiled.compile_one(nvcc, rest, "90a", str(tmp_path / name))
    binding = _build_cuda.bind_command(ROOT / "csrc", TORCH, _build.find_compiler(), "-DOLLAMAPY_FORMS(X)=X(Q4_K, 12)")
    objects = [*_build.compile_all(tmp_path, {"bind.o": binding}), *(str(tmp_path / name) for name in some)]
    library = tmp_path / _build_cuda.LIBRARY
    _build.link(library, [nvcc, *objects, f"-L{TORCH / 'lib'}", *_build_cuda.LINK])
    code = f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.ollamapy_cuda.forms())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "Q4_K", done.stderr


@pytest.mark.parametrize(
    "said", ["8 bytes stack frame, 12 bytes spill stores, 12", "16 bytes stack frame, 0 bytes spill stores, 0"]
)
def test_a_spill_is_found(said: str) -> None:
    """Also a copy on the stack that is no spill, as of an array whose index is not known."""
    log = f"Compiling entry function '_Z10mma_kernelv' for 'sm_90a'\n {said} bytes spill loads"
    with pytest.raises(compiled.Spilled, match=said):
        compiled.report(log, "linear.Q6_K.o")


@pytest.mark.timeout(900)
def test_no_kernel_spills(nvcc: str) -> None:
    """All types for all architectures, within the budget. 45 s on two cores."""
    assert not compiled.compare(compiled.compile_all([], _build_cuda.ARCHITECTURES))
