"""One step of `bench.gpu_check` on a device: builds, checks or times, and writes its figures as JSON after each of them.

On a CPU (to try the script) sizes are tiny, Triton interprets, and the CUDA kernels run through tests/cuda/cuda_on_cpu.h:
the figures then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import gpu_timing as timing
from ollamapy import cuda_extension, cuda_kernels
from ollamapy.gguf.types import GGMLType

ROOT = Path(__file__).parent.parent
TYPES = [GGMLType[name] for name in ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0")]
SHAPES = {  # rows, columns of the matrices of Llamas
    "1B": ((2048, 2048), (8192, 2048), (2048, 8192)),
    "8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}


class Report:
    """Figures of a step, on disk as soon as they are known."""

    def __init__(self, out: Path) -> None:
        self._out, self.figures = out, dict[str, Any](rows=[])

    def __setitem__(self, key: str, value: Any) -> None:
        self.figures[key] = value
        self._write()

    def row(self, **cells: Any) -> None:
        self.figures["rows"].append(cells)
        self._write()

    def attempt(self, what: str, work: Callable[[], Any]) -> None:
        """A part whose failure is a row and does not stop the others."""
        try:
            work()
        except Exception as problem:
            self.row(what=what, failed=f"{type(problem).__name__}: {str(problem)[:300]}")

    def _write(self) -> None:
        self._out.write_text(json.dumps(self.figures))


def library(device: torch.device) -> None:
    """The CUDA kernels, for the GPU or on the CPU."""
    if device.type == "cpu":
        from tests.cuda import on_cpu

        cuda_extension.use(on_cpu.build(ROOT / "build" / "cuda_on_cpu", forms=("Q4_K", "Q6_K")))
    assert cuda_extension.load() is not None, cuda_extension.status()


def build(device: torch.device, report: Report) -> None:
    start = time.perf_counter()
    library(device)
    report["build_seconds"] = round(time.perf_counter() - start, 1)
    report["forms"] = cuda_extension.load().forms()  # type: ignore[union-attr]


def kernels(device: torch.device, report: Report) -> None:
    """The checks of tests/cuda on the device, and under compute-sanitizer where that is installed."""
    environment = dict(os.environ)
    if device.type == "cpu":
        from tests.cuda import on_cpu

        environment["CUDA_CHECK_LIBRARY"] = str(on_cpu.build(ROOT / "build" / "cuda_on_cpu", forms=("Q4_K", "Q6_K")))
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    cuda = ["tests/cuda/check_linear.py", "tests/cuda/check_elementwise.py"]
    triton = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "triton").glob("check_*.py"))
    runs = {"cuda": [*pytest, *cuda], "triton": [*pytest[:-2], *(triton[:1] if device.type == "cpu" else triton)]}
    runs["sanitizer"] = ["compute-sanitizer", "--error-exitcode=1", *pytest, *cuda, "-k", "Q4_K or Q6_K or rope"]
    for name, command in runs.items():
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
        except (OSError, subprocess.TimeoutExpired) as problem:
            report.row(checks=name, passed=None, summary=f"not run: {problem}"[:300])
            continue
        lines = (done.stdout + done.stderr).strip().splitlines()
        report.row(checks=name, passed=done.returncode == 0, summary=" | ".join(lines[-3:])[-600:])


def time_kernels(device: torch.device, report: Report) -> None:
    library(device)
    small = device.type == "cpu"
    probe = timing.probe(device, (1 << 16) if small else (1 << 30))
    report["probe_gbs"] = round(probe, 1)
    types = TYPES[:1] if small else TYPES
    shapes = {"tiny": ((64, 256),)} if small else SHAPES
    for model, sizes in shapes.items():
        for type in types:
            for rows, columns in sizes:
                what = f"{model} {type.name} {rows}x{columns}"
                report.attempt(what, lambda w=what, t=type, r=rows, c=columns: matvec(device, report, w, (t, r, c), probe))
    sweep = [1, 2] if small else [1, 2, 4, 8, 12, 16, 24, 32, 48, 64]
    prefill = [16] if small else [64, 128, 256, 512, 1024, 2048, 4096, 8192]
    shape = (GGMLType.Q4_K, *(shapes["tiny"][0] if small else (4096, 14336)))
    for count in [*sweep, *prefill]:
        report.attempt(f"{count} rows", lambda n=count: many_rows(device, report, shape, n))
    for context in [32] if small else [1024, 4096, 16384, 65536]:
        report.attempt(f"attention at {context}", lambda n=context: timing.attention(device, report.row, n, small))
    report.attempt("packing", lambda: timing.packing(device, report.row, small))


def matvec(device: torch.device, report: Report, what: str, shape: tuple[GGMLType, int, int], probe: float) -> None:
    """One row, weights not in the L2 cache, by each family."""
    planes = timing.copies(*shape, device)
    x = torch.randn(1, shape[2], device=device)
    rows = cuda_kernels.quantize(x)
    out = torch.empty(1, shape[1], device=device)
    cells: dict[str, Any] = {}
    project = timing.triton_project()
    for family, call in {
        "cuda": lambda w: cuda_kernels.matmul(rows, [w], [out], [None], path=cuda_kernels.MATVEC),
        "mma": lambda w: cuda_kernels.matmul(rows, [w], [out], [None], path=cuda_kernels.MMA),
        "triton": lambda w: project(x, w, out),
    }.items():
        seconds = timing.over(planes, call, device)
        gbs = planes[0].nbytes / seconds / 1e9
        cells |= {
            f"{family}_us": round(seconds * 1e6, 1),
            f"{family}_gbs": round(gbs),
            f"{family}_probe": round(gbs / probe, 3),
        }
    report.row(matvec=what, mb=round(planes[0].nbytes / 1e6, 1), **cells)


def many_rows(device: torch.device, report: Report, shape: tuple[GGMLType, int, int], count: int) -> None:
    """`count` rows: microseconds by each path, quantization of the rows apart."""
    planes = timing.copies(*shape, device)
    x = torch.randn(count, shape[2], device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    rows, out = cuda_kernels.quantize(x), torch.empty(count, shape[1], device=device)
    cells = {"quantize_us": timing.over([x], cuda_kernels.quantize, device)}
    if count <= cuda_kernels.MATVEC_MOST:
        cells["matvec_us"] = timing.over(
            planes, lambda w: cuda_kernels.matmul(rows, [w], [out], [None], path=cuda_kernels.MATVEC), device
        )
    cells["mma_us"] = timing.over(
        planes, lambda w: cuda_kernels.matmul(rows, [w], [out], [None], path=cuda_kernels.MMA), device
    )
    project = timing.triton_project()
    cells["triton_us"] = timing.over(planes, lambda w: project(x, w, out), device)
    report.row(rows=count, **{key: round(value * 1e6, 1) for key, value in cells.items()})


def end_to_end(device: torch.device, report: Report) -> None:
    """Decode and prefill of a random 8B Q4_K_M, made on the device, through the engine."""
    from bench import gpu_engine

    library(device)
    for family in ("triton",) if device.type == "cpu" else ("csrc", "triton"):
        report.attempt(family, lambda f=family: gpu_engine.run(device, f, report.row))


def llama(device: torch.device, report: Report) -> None:
    """llama-bench on a file of the same shapes, where LLAMA_CPP_BIN says where it is."""
    folder = os.environ.get("LLAMA_CPP_BIN", "")
    if not folder or device.type == "cpu":
        report["skipped"] = "LLAMA_CPP_BIN is not set" if not folder else "no GPU"
        return
    from bench import gpu_engine, make_model

    path = make_model.make(ROOT / "build" / "random-llama-8b.gguf", gpu_engine.SHAPE_8B, "Q4_K_M")
    command = [f"{folder}/llama-bench", "-m", str(path), "-ngl", "99", "-fa", "1", "-p", "512,4096", "-n", "128", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for row in json.loads(done.stdout):
        report.row(prompt=row["n_prompt"], generated=row["n_gen"], tokens_per_second=round(row["avg_ts"], 1))


STEPS = {"build": build, "kernels": kernels, "time": time_kernels, "e2e": end_to_end, "llama": llama}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    STEPS[args.step](torch.device(args.device), Report(args.out))


if __name__ == "__main__":
    main()
