"""The CUDA library: built on first use by nvcc for the GPUs at hand, or absent. Never an error: Triton serves without it.

Knows no op: `load` gives the namespace that csrc/cuda/bind.cpp declares.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ollamapy import _build, _build_cuda, env

log = logging.getLogger(__name__)

LEAST = (8, 0)  # asynchronous copies, mma with k = 32


class CudaExtension:
    """The library of one process. Loading happens once; its outcome stays."""

    def __init__(self) -> None:
        self.ops: Any | None = None
        self.status = ""

    def load(self, settings: env.Settings) -> None:
        if settings.no_extension:
            self.status = "off"
            return
        try:
            self.use(build_here(settings), "built on first use")
        except (_build.BuildError, OSError, RuntimeError) as problem:
            self.status = f"unavailable: {str(problem).splitlines()[0]}"
            log.info("the CUDA kernels are unavailable: %s", problem)

    def use(self, library: Path, how: str) -> None:
        """Takes a library that is there."""
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        self.ops, self.status = torch.ops.ollamapy_cuda, how


def build_here(settings: env.Settings) -> Path:
    """The library for the GPUs that this process sees. Raises BuildError."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise _build.BuildError("no CUDA device")
    seen = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    archs = sorted(_build_cuda.architecture(capability) for capability in seen if capability >= LEAST)
    if not archs:
        raise _build.BuildError(f"no GPU of compute capability {LEAST[0]}.{LEAST[1]} or later")
    sources = _build.find_sources(Path(__file__).resolve().parent)
    cache = (settings.cache_home if settings.cache_home.parts else settings.home / ".cache") / "ollamapy"
    return _build_cuda.cached(cache, sources, Path(torch.__file__).parent, (settings.cuda_home, settings.cxx), archs)


_extension = CudaExtension()


def load() -> Any | None:
    """`torch.ops.ollamapy_cuda`, or None where the library is switched off or cannot be had."""
    if not _extension.status:
        _extension.load(env.load())
    return _extension.ops


def use(library: Path) -> None:
    """Takes a library that was built elsewhere: a test's, or one that was compiled ahead."""
    _extension.use(library, "given")


def status() -> str:
    """How the library was had: "built on first use", "given", "off", or "unavailable: <reason>"."""
    load()
    return _extension.status
