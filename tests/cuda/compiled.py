"""Compiles the CUDA kernels for GPUs that need not be there, and compares what they take of them with budget.json.

`python -m tests.cuda.compiled` compiles all types for all architectures (five minutes on two cores that others use too);
`--forms Q4_K --archs 90a` some; `--write` records new figures. Registers and static shared memory must not grow; spilled
registers are never allowed.
(Dynamic shared memory is bounded where it is asked for: a static_assert of linear.cu.)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ollamapy import _build, _build_cuda

ROOT = Path(__file__).parents[2]
BUDGET = Path(__file__).with_name("budget.json")
Figures = dict[str, tuple[int, int]]
"""kernel -> registers of a thread, bytes of static shared memory"""


class Spilled(AssertionError):
    """Registers that went to memory."""


def name_of(mangled: str, source: str) -> str:
    """A kernel's own name and the numbers that its template was given, after the name of the object it is in."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    numbers = re.findall(r"Li(\d+)E", mangled.split("EEELi", 1)[1]) if "EEELi" in mangled else []
    first = re.search(r"EEELi(\d+)", mangled)
    shape = [first[1], *numbers] if first else []
    return " ".join([source.removesuffix(".o"), name[1] if name else mangled, "x".join(shape)]).strip()


def report(log: str, source: str) -> Figures:
    """What ptxas -v says. Raises Spilled."""
    figures: Figures = {}
    kernel = ""
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            kernel = name_of(entry[1], source)
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if spill[1] != "0" or spill[2] != "0":
                raise Spilled(f"{kernel}: {spill[1]} bytes of registers are spilled")
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            figures[kernel] = (int(used[1]), int(shared[1]) if shared else 0)
    return figures


def compile_one(nvcc: str, name: str, rest: Sequence[str], arch: str, out: str = os.devnull) -> Figures:
    """One object for one architecture. Raises Spilled, and RuntimeError with the compiler's words."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, *_build_cuda.NVCC, target, "-Xptxas=-v", "-c", *rest, "-o", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return report(done.stderr, name)


def compile_all(forms: Sequence[str], archs: Sequence[str], sources: Path = ROOT / "csrc") -> dict[str, Figures]:
    """architecture -> figures."""
    torch = _build.find_torch()
    assert torch is not None
    nvcc = _build_cuda.find_nvcc("", torch)
    jobs = [(arch, name, rest) for arch in archs for name, rest in _build_cuda.kernels(sources, forms).items()]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = list(pool.map(lambda job: compile_one(nvcc, job[1], job[2], job[0]), jobs))
    figures: dict[str, Figures] = {arch: {} for arch in archs}
    for (arch, _, _), some in zip(jobs, found, strict=True):
        figures[arch].update(some)
    return figures


def compare(figures: dict[str, Figures]) -> list[str]:
    """What is beyond the budget, or not in it."""
    budget = json.loads(BUDGET.read_text())
    grown = []
    for arch, kernels in figures.items():
        for kernel, found in kernels.items():
            allowed = budget.get(arch, {}).get(kernel)
            if allowed is None or any(new > old for new, old in zip(found, allowed, strict=True)):
                grown.append(f"sm_{arch} {kernel}: {found} registers and shared bytes, budget {allowed}")
    return grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forms", nargs="*", default=[])
    parser.add_argument("--archs", nargs="*", default=list(_build_cuda.ARCHITECTURES))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    figures = compile_all(args.forms, args.archs)
    if args.write:
        lines = [
            f' "{arch}": {{\n'
            + ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(found)}" for kernel, found in sorted(kernels.items()))
            + "\n }"
            for arch, kernels in figures.items()
        ]
        BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return 0
    grown = compare(figures)
    print("\n".join(grown) or f"{sum(map(len, figures.values()))} kernels within the budget, none spills")
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main())
