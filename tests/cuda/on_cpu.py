"""Builds the library of csrc/cuda for the CPU: the same kernels and bindings, through cuda_on_cpu.h, for CPU tensors.

`python -m tests.cuda.on_cpu FOLDER` builds it and says where it is: CUDA_CHECK_LIBRARY for the checks of this folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ollamapy import _build, _build_cuda

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ("-I", str(HERE), "-DOLLAMAPY_CUDA_ON_CPU", "-mfma", "-Wno-unknown-pragmas", "-O1")
SANITIZE = ("-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def build(folder: Path, sources: Path = ROOT / "csrc", extra: tuple[str, ...] = (), forms: tuple[str, ...] = ()) -> Path:
    """The library in `folder`; what is there already and was built from the same files is kept."""
    torch, cxx = _build.find_torch(), _build.find_compiler()
    assert torch is not None
    facts = repr((FLAGS, extra, forms))
    name = _build.hash_of(sources, _build_cuda.cuda_files(sources), facts + (HERE / "cuda_on_cpu.h").read_text())
    library = folder / name / _build_cuda.LIBRARY
    if library.exists():
        return library
    plain = [flag for flag in _build.COMMON if flag != "-O3"]
    commands = {
        key: [cxx, *plain, *FLAGS, *extra, "-x", "c++", "-c", *rest]
        for key, rest in _build_cuda.kernels(sources, forms).items()
    }
    known = _build_cuda.forms(sources)
    some = "".join(f"X({form}, {known[form]})" for form in forms or known)
    macros = ("-DOLLAMAPY_CUDA_ON_CPU", f"-DOLLAMAPY_FORMS(X)={some}")
    commands["bind.o"] = [*_build_cuda.bind_command(sources, torch, cxx, *macros), *extra]
    objects = _build.compile_all(library.parent / "objects", commands)
    _build.link(library, [cxx, *objects, f"-L{torch / 'lib'}", *_build.LINK, *extra])
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
