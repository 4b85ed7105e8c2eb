"""Compiles the CUDA kernels for GPUs that need not be there, and compares what they take of them with budget.json.

`python -m tests.cuda.compiled` compiles all types for all architectures (a minute on two cores); `--forms Q4_K --archs 90a`
some; `--write` records new figures. Registers and static shared memory must not grow; spills and stack are never allowed.
(Dynamic shared memory is bounded where it is asked for: a static_assert of linear.cu.)

nvcc's front end takes two thirds of the time and writes the same PTX for 80, 89 and 90a, and the same for 100 and 120: it runs
once for each of the two, and for one type each run compares what it writes for every architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ollamapy import _build, _build_cuda

ROOT = Path(__file__).parents[2]
BUDGET = Path(__file__).with_name("budget.json")
FRONT_ENDS = {"80": ("80", "89", "90a"), "100": ("100", "120")}
"""Virtual architecture -> those that have its PTX."""
COMPARED = "Q4_K"  # the type whose PTX is compared; the files without types are compared too
Figures = dict[str, tuple[int, int]]
"""kernel -> registers of a thread, bytes of static shared memory"""


class Spilled(AssertionError):
    """What should be in registers is on the stack: registers that went there, or copies of arrays and arguments."""


def name_of(mangled: str, source: str) -> str:
    """A kernel's own name and the numbers that its template was given, after the name of the object it is in."""
    name = re.search(r"\d+([a-z_]+_kernel)", mangled)
    numbers = re.findall(r"Li(\d+)E", mangled.split("EEELi", 1)[1]) if "EEELi" in mangled else []
    first = re.search(r"EEELi(\d+)", mangled)
    shape = [first[1], *numbers] if first else []
    return " ".join([source.removesuffix(".o"), name[1] if name else mangled, "x".join(shape)]).strip()


def report(log: str, source: str) -> dict[str, Figures]:
    """architecture -> what ptxas -v says. Raises Spilled."""
    figures: dict[str, Figures] = {}
    kernel = arch = ""
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            kernel, arch = name_of(entry[1], source), entry[2]
        elif spill := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if any(count != "0" for count in spill.groups()):
                raise Spilled(f"sm_{arch} {kernel}: {spill[0]}")
        elif used := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            figures.setdefault(arch, {})[kernel] = (int(used[1]), int(shared[1]) if shared else 0)
    return figures


def run(command: Sequence[str]) -> str:
    """What nvcc says. Raises RuntimeError with its words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.stderr


def compile_one(nvcc: str, rest: Sequence[str], arch: str, out: str) -> None:
    """One object for one architecture, as the library has it."""
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    run([nvcc, *_build_cuda.NVCC, target, "-c", *rest, "-o", out])


def compile_for(nvcc: str, name: str, rest: Sequence[str], front_end: str, archs: Sequence[str]) -> dict[str, Figures]:
    """The device code of one object for architectures of one front end. Raises Spilled."""
    codes = ",".join(f"sm_{arch}" for arch in archs)
    target = f"-gencode=arch=compute_{front_end},code=[{codes}]"
    return report(run([nvcc, *_build_cuda.NVCC, target, "-Xptxas=-v", "-fatbin", *rest, "-o", os.devnull]), name)


def ptx(nvcc: str, rest: Sequence[str], arch: str) -> str:
    """What the front end writes, but for the name of its target."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        run([nvcc, *_build_cuda.NVCC, f"-arch=compute_{arch}", "-ptx", *rest, "-o", file.name])
        return re.sub(r"^(\.target .*|//.*)$", "", Path(file.name).read_text(), flags=re.MULTILINE)


def compile_all(forms: Sequence[str], archs: Sequence[str], sources: Path = ROOT / "csrc") -> dict[str, Figures]:
    """architecture -> figures."""
    torch = _build.find_torch()
    assert torch is not None
    nvcc = _build_cuda.find_nvcc("", torch)
    groups = {end: chosen for end, members in FRONT_ENDS.items() if (chosen := [arch for arch in members if arch in archs])}
    objects = _build_cuda.kernels(sources, forms)
    jobs = [(name, rest, end, chosen) for end, chosen in groups.items() for name, rest in objects.items()]
    compared = _build_cuda.kernels(sources, [COMPARED])
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(lambda job: compile_for(nvcc, *job), jobs)
        texts = {
            (name, end): [pool.submit(ptx, nvcc, rest, arch) for arch in dict.fromkeys((end, *chosen))]
            for name, rest in compared.items()
            for end, chosen in groups.items()
        }
        figures: dict[str, Figures] = {arch: {} for arch in archs}
        for by_arch in found:
            for arch, some in by_arch.items():
                figures[arch].update(some)
        for (name, end), written in texts.items():
            assert len({text.result() for text in written}) == 1, f"{name}: {FRONT_ENDS[end]} have not the same PTX any more"
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
    start = time.perf_counter()
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
    count, seconds = sum(map(len, figures.values())), time.perf_counter() - start
    print(
        "\n".join(grown) or f"{count} kernels for {len(figures)} architectures within the budget, none spills: {seconds:.0f} s"
    )
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main())
