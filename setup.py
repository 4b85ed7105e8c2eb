"""Installs csrc/ and triton_kernels/ inside the package, and builds the C++ extension where torch is already installed.

torch is no build requirement (it would pull gigabytes into an isolated build): without it, or without a compiler, the
package installs all the same and `ollamapy.extension` builds the same sources on first use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load_build():
    """ollamapy/_build.py, without importing the package around it."""
    spec = importlib.util.spec_from_file_location("_build", ROOT / "ollamapy" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        builder = load_build()
        torch = builder.find_torch(os.path.join(os.environ.get("VIRTUAL_ENV", sys.prefix), "bin", "python"))
        if torch is None:
            print("ollamapy: torch is not installed; the C++ kernels will be built on first use")
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            cxx = builder.find_compiler(os.environ.get("CXX", ""))
            jobs = int(os.environ.get("MAX_JOBS", "0"))
            commands = builder.compile_commands(ROOT / "csrc", torch, cxx, tuple(builder.isas()))
            builder.build(target, Path(self.build_temp).resolve(), commands, torch, jobs)
        except builder.BuildError as problem:
            print(f"ollamapy: the C++ kernels could not be built, it will be tried again on first use: {problem}")


def source_packages(folder: str, name: str) -> list[str]:
    """`name` and a package for each folder below, so that their files are installed as data."""
    if not (ROOT / folder).is_dir():
        return []
    inner = [path for path in sorted((ROOT / folder).rglob("*")) if path.is_dir() and path.name != "__pycache__"]
    return [name, *(".".join((name, *path.relative_to(ROOT / folder).parts)) for path in inner)]


setup(
    packages=[
        *find_packages(include=["ollamapy", "ollamapy.*"]),
        *source_packages("csrc", "ollamapy.csrc"),
        *source_packages("triton_kernels", "ollamapy.triton_kernels"),
    ],
    package_dir={"ollamapy.triton_kernels": "triton_kernels", "ollamapy.csrc": "csrc"},
    package_data={"*": ["*.cpp", "*.h", "*.cu", "*.cuh", "*.json", "*.html", "*.css", "*.js", "*.jinja", "*.txt", "py.typed"]},
    ext_modules=[Extension("ollamapy._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
