"""The C++ extension: found ready-made, or built on first use, or absent. Never an error: without it the reference serves.

Knows no op: `load` gives the namespace that csrc/ops.cpp declares, and `ops` decides what to do with it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ollamapy import _build, env
from ollamapy.cores import MAX_THREADS, physical_cores

log = logging.getLogger(__name__)


class Extension:
    """The library of one process. Loading happens once; its outcome stays."""

    def __init__(self) -> None:
        self.ops: Any | None = None
        self.status = ""
        self.isa = ""

    def load(self, settings: env.Settings) -> None:
        if settings.no_extension:
            self.status = "off"
            return
        try:
            library, how = find_library(Path(__file__).resolve().parent, settings)
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
            self.isa = self._choose_isa(settings.cpu_isa)
        except (_build.BuildError, OSError, RuntimeError) as problem:
            reason = str(problem)
            self.status = f"unavailable: {reason.splitlines()[0]}"
            log.warning("the C++ kernels are unavailable, slower ones are used: %s", reason)
            return
        self.ops, self.status = torch.ops.ollamapy, how
        self.ops.set_threads(min(physical_cores(), MAX_THREADS))

    def _choose_isa(self, wanted: str) -> str:
        possible = torch.ops.ollamapy.cpu_isas().split()
        if wanted and wanted not in possible:
            log.warning("ignoring OLLAMAPY_CPU_ISA=%s: the kernels at hand can run on %s", wanted, ", ".join(possible))
            wanted = ""
        return str(torch.ops.ollamapy.cpu_isa(wanted))


def find_library(package: Path, settings: env.Settings) -> tuple[Path, str]:
    """The library and how it came to be. One in the package that was built from other sources is passed over."""
    sources = _build.find_sources(package)
    prebuilt = package / _build.LIBRARY
    if prebuilt.exists() and _build.built_from(prebuilt) == _build.source_hash(sources):
        return prebuilt, "prebuilt"
    return _build.cached(
        settings.cache_folder, sources, Path(torch.__file__).parent, settings.cxx, settings.cpu_isa
    ), "built on first use"


_extension = Extension()


def load() -> Any | None:
    """`torch.ops.ollamapy`, or None where the extension is switched off or cannot be had (a warning tells once why)."""
    if not _extension.status:
        _extension.load(env.load())
    return _extension.ops


def status() -> str:
    """How the extension was had: "prebuilt", "built on first use", "off", or "unavailable: <reason>"."""
    load()
    return _extension.status


def isa() -> str:
    """Instruction set of the CPU kernels in force: base, avx2, avx512vnni or avx512bf16; "" without the extension."""
    load()
    return _extension.isa
