"""Compiles csrc/cuda/ into a library of its own, `_C_cuda.abi3.so`, for the GPUs at hand: on first use, where nvcc is.

Imports no torch and knows no GPU: `cuda_extension` says which architectures are wanted.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ollamapy import _build

LIBRARY = "_C_cuda.abi3.so"
ARCHITECTURES = ("80", "89", "90a", "100", "120")
"""What CI compiles for. Older GPUs have no asynchronous copies and no mma with k = 32."""

# Products enter sums only where the source says so: the order and rounding of sums is a promise.
NVCC = ("-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Wno-deprecated-gpu-targets")
LINK = ("-shared", "-cudart=static", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")
SOURCES = "cuda"


def find_nvcc(cuda_home: str, torch: Path) -> str:
    """Path of nvcc: of CUDA_HOME, of PATH, of the usual folder, or of NVIDIA's wheels beside torch."""
    homes = [Path(cuda_home)] if cuda_home else [Path("/usr/local/cuda"), *sorted((torch.parent / "nvidia").glob("cu*"))]
    found = [None if cuda_home else shutil.which("nvcc"), *(shutil.which(home / "bin" / "nvcc") for home in homes)]
    for path in filter(None, found):
        return path
    raise _build.BuildError("nvcc is not installed")


def architecture(capability: tuple[int, int]) -> str:
    """nvcc's name of a compute capability: of 9.0 with what only that architecture has."""
    major, minor = capability
    return "90a" if capability == (9, 0) else f"{major}{minor}"


def cuda_files(sources: Path) -> list[Path]:
    """What the library is made of."""
    return [*sorted(path for path in (sources / SOURCES).iterdir() if path.is_file()), sources / "common" / "check.h"]


def source_hash(sources: Path) -> str:
    return _build.hash_of(sources, cuda_files(sources), repr((NVCC, LINK)))


def forms(sources: Path) -> dict[str, str]:
    """The quantization types, each of which is an object of its own, and their numbers in GGUF."""
    listed = (sources / SOURCES / "forms.h").read_text()
    return dict(re.findall(r"X\((\w+), (\d+)\)", listed.split("#define OLLAMAPY_FORMS")[1]))


def kernels(sources: Path, chosen: Sequence[str] = ()) -> dict[str, list[str]]:
    """Object name -> source and macros: linear.cu once for each quantization type (or each `chosen` one), the others once."""
    found = {}
    for path in sorted((sources / SOURCES).glob("*.cu")):
        if path.stem != "linear":
            found[f"{path.stem}.o"] = [str(path)]
            continue
        for form in chosen or forms(sources):
            found[f"linear.{form}.o"] = [f"-DOLLAMAPY_FORM={form}", str(path)]
    return found


def nvcc_commands(sources: Path, nvcc: str, archs: Sequence[str], chosen: Sequence[str] = ()) -> dict[str, list[str]]:
    """Object name -> command, without the output."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return {name: [nvcc, *NVCC, *targets, "-c", *rest] for name, rest in kernels(sources, chosen).items()}


def bind_command(sources: Path, torch: Path, cxx: str, *flags: str) -> list[str]:
    """The bindings, which want the C++ compiler and torch's headers."""
    marker = f'-DOLLAMAPY_SOURCES="{source_hash(sources)}"'
    include = ["-isystem", str(torch / "include")]
    return [cxx, *_build.COMMON, *include, marker, *flags, "-c", str(sources / SOURCES / "bind.cpp")]


def build(library: Path, sources: Path, torch: Path, nvcc: str, cxx: str, archs: Sequence[str]) -> None:
    """All kernels for `archs` into `library`. Raises BuildError."""
    commands = nvcc_commands(sources, nvcc, archs)
    compiler = ["-ccbin", cxx]
    # The matmuls take the longest: several compilers at a time, as many as there are cores.
    objects = _build.compile_all(library.parent / "objects", commands, extra=compiler)
    objects += _build.compile_all(library.parent / "objects", {"bind.o": bind_command(sources, torch, cxx)})
    _build.link(library, [nvcc, *compiler, *objects, f"-L{torch / 'lib'}", *LINK])


def cached(cache: Path, sources: Path, torch: Path, tools: tuple[str, str], archs: Sequence[str]) -> Path:
    """The library of these sources for `archs` in `cache`, built now when it is not there. `tools`: CUDA_HOME and CXX."""
    cuda_home, cxx = tools
    library = cache / f"{source_hash(sources)}-sm_{'_'.join(archs)}" / LIBRARY

    def make(nvcc: str) -> None:
        build(library, sources, torch, nvcc, _build.find_compiler(cxx), archs)

    return _build.built_once(library, lambda: os.path.realpath(find_nvcc(cuda_home, torch)), make)
