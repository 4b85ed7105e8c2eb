"""Program: the tests of the C++ kernels on a library built with the address and undefined behaviour sanitizers.

The library is built in a copy of the tree, so that no other process meets it; `make test-sanitize` runs this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ollamapy import _build

ROOT = Path(__file__).parents[2]
FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
TESTS = ("tests/csrc/test_embedding.py", "tests/ops/test_cpu_kernels.py")


def preload(compiler: str) -> str:
    """The sanitizer must be loaded before Python, and the C++ runtime with it, or exceptions are lost."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.run([compiler, f"-print-file-name={n}"], capture_output=True, text=True, check=True) for n in names]
    return " ".join(done.stdout.strip() for done in found)


def main() -> int:
    torch, compiler = _build.find_torch(), _build.find_compiler()
    assert torch is not None
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        for part in ("ollamapy", "triton_kernels", "csrc", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", tree)
        own = tuple(name for name, isa in _build.isas().items() if not isa.kernels_of)  # the others run the same code again
        library = tree / "ollamapy" / _build.LIBRARY
        commands = _build.compile_commands(tree / "csrc", torch, compiler, own)
        _build.build(library, Path(folder) / "objects", commands, torch, extra=FLAGS)
        assert b"__asan_report_load" in library.read_bytes(), "built without the sanitizers"
        variables = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "LD_PRELOAD": preload(compiler),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        arguments = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "timeout=1200", "-s", *TESTS]
        return subprocess.run([*arguments, *sys.argv[1:]], cwd=tree, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
