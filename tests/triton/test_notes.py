"""The table of kernels in bench/notes/gpu.md names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import ollamapy.triton_kernels as triton_kernels
from ollamapy import cuda_kernels
from ollamapy.triton_kernels.forms import FORMS

ROOT = Path(__file__).parents[2]


def test_the_table_of_kernels_is_current() -> None:
    notes = (ROOT / "bench" / "notes" / "gpu.md").read_text()
    table = notes[notes.index("## Kernels") : notes.index("Launches a layer")]
    has_kernels = [path.name for path in (ROOT / "triton_kernels").glob("*.py") if "@triton.jit" in path.read_text()]
    has_ops = {f"{place.partition('.')[0]}.py" for place in triton_kernels.OPS.values()}
    shared = {"decode.py", "cache.py"}  # what others decode with, and a layout
    named = set(re.findall(r"\b\w+\.(?:py|cuh?)\b", table))
    assert {*has_kernels, *has_ops} - shared <= named, "a file with kernels that the table does not name"
    cuda = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu*") if "__global__" in path.read_text()}
    assert cuda <= named
    folders = [ROOT / "triton_kernels", ROOT / "ollamapy" / "reference"]
    gone = [name for name in named if name.endswith(".py") and not any((folder / name).exists() for folder in folders)]
    assert not gone, gone
    assert f'"{len(FORMS)} types"' in notes and f'"{len(cuda_kernels.TYPES)} types"' in notes
