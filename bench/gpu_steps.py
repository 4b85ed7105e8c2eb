"""One step of `bench.gpu_check` on a device: builds, checks or times, and writes its figures as JSON after each of them.

On a CPU (to try the script) sizes are tiny, Triton interprets, and the CUDA kernels run through tests/cuda/cuda_on_cpu.h:
the figures then mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import gpu_timing as timing
from ollamapy import cuda_extension, cuda_kernels
from ollamapy.gguf.types import GGMLType

ROOT = Path(__file__).parent.parent
KERNELS_SECONDS = 102.0  # for the checks of `kernels`, of the 110 that it has
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

    def end(self) -> None:
        """Fails the step when a row of it does: a part that failed, a check that found something or was not done. Only a tool
        that is not installed, or has said nothing when its time was up, does not count: it is in the report as that."""
        failed = [row for row in self.figures["rows"] if any(key.endswith("failed") for key in row)]
        checks = [row for row in self.figures["rows"] if "checks" in row]
        failed += [row for row in checks if not row["passed"] and not row.keys() & {"absent", "not_finished"}]
        if failed:
            names = [str(next(iter(row.values()))) for row in failed]  # the first cell says what a row is about
            raise SystemExit(f"failed or not done: {', '.join(names)}")

    def _write(self) -> None:
        half = self._out.with_suffix(".part")  # whoever ends this step finds a whole file
        half.write_text(json.dumps(self.figures))
        half.replace(self._out)


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
    """The checks of tests/cuda and tests/triton on the device, all at once, and then under compute-sanitizer where that is
    installed. Triton's checks hold tensors of the host: TRITON_CHECK_DEVICE has their launches carried to the device."""
    end = time.monotonic() + KERNELS_SECONDS
    environment = dict(os.environ)
    small = device.type == "cpu"
    if small:
        from tests.cuda import on_cpu

        environment["CUDA_CHECK_LIBRARY"] = str(on_cpu.build(ROOT / "build" / "cuda_on_cpu", forms=("Q4_K", "Q6_K")))
    else:
        environment["TRITON_CHECK_DEVICE"] = str(device)
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--maxfail=5", "-m", "gpu or not gpu"]
    cuda = ["tests/cuda/check_linear.py", "tests/cuda/check_elementwise.py"]
    triton = sorted(path.stem for path in (ROOT / "tests" / "triton").glob("check_*.py"))
    runs = {"cuda": [*pytest, *cuda]}
    runs |= {f"triton {name}": [*pytest, f"tests/triton/{name}.py"] for name in (triton[1:2] if small else triton)}
    together(runs, environment, dict.fromkeys(runs, 65.0), report)
    tools = {
        "memcheck": "Q4_K or Q6_K or rope or norm",
        "racecheck": "products and Q4_K or norm",
        "synccheck": "products and Q4_K or norm",
    }
    left = max(end - time.monotonic(), 1.0)
    limits = {"memcheck": min(40.0, left), "synccheck": min(40.0, left), "racecheck": left}  # it looks at every access
    sanitizer = ["compute-sanitizer", "--error-exitcode=1"]
    runs = {tool: [*sanitizer, f"--tool={tool}", *pytest, *cuda, "-k", chosen] for tool, chosen in tools.items()}
    together(runs, environment, limits, report, slow=True)


def together(
    runs: dict[str, list[str]], environment: dict[str, str], limits: dict[str, float], report: Report, slow: bool = False
) -> None:
    """Processes at once, for checks of correctness; those that are not done within their seconds are ended, and say so: that is
    a failure but for `slow` ones, which may need more time than there is."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        started = {}
        for name, command in runs.items():
            log = Path(folder) / name
            try:
                with log.open("w") as out:  # a group of its own: compute-sanitizer is ended with the program that it runs
                    started[name] = subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, process_group=0
                    )
            except FileNotFoundError:
                report.row(checks=name, passed=None, absent=f"{command[0]} is not installed")
        for name, process in sorted(started.items(), key=lambda item: limits[item[0]]):
            try:
                passed: bool | None = process.wait(max(begin + limits[name] - time.monotonic(), 0.1)) == 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                passed = None
            summary = " | ".join((Path(folder) / name).read_text().strip().splitlines()[-3:])[-600:]
            ended = f"not {'finished' if slow else 'done'} within {limits[name]:.0f} s: {summary}"
            cells = {"summary": summary} if passed is not None else {"not_finished" if slow else "summary": ended}
            report.row(checks=name, passed=passed, **cells)


def time_kernels(device: torch.device, report: Report) -> None:
    report.attempt("csrc/cuda", lambda: library(device))
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
    size = shapes["tiny"][0] if small else (4096, 14336)
    for count in [*sweep, *prefill]:
        report.attempt(f"{count} rows", lambda n=count: many_rows(device, report, (types[0], *size), n))
    for context in [32] if small else [1024, 4096, 16384, 65536]:
        for batch in [1, 3] if small else [1, 8, 64]:
            what = f"attention of {batch} at {context}"
            report.attempt(what, lambda n=context, b=batch: timing.attention(device, report.row, n, b, small))
    report.attempt("packing", lambda: timing.packing(device, report.row, small))
    for type in types[1:]:  # last: what there is no time for
        for count in sweep[1:]:
            report.attempt(f"{count} rows of {type.name}", lambda t=type, n=count: many_rows(device, report, (t, *size), n))


def matvec(device: torch.device, report: Report, what: str, shape: tuple[GGMLType, int, int], probe: float) -> None:
    """One row, weights not in the L2 cache, by each family."""
    planes = timing.copies(*shape, device)
    x = torch.randn(1, shape[2], device=device)
    cells: dict[str, Any] = {}
    for family, seconds in by_each(planes, x, shape[1], device, cells).items():
        gbs = planes[0].nbytes / seconds / 1e9
        cells |= {
            f"{family}_us": round(seconds * 1e6, 1),
            f"{family}_gbs": round(gbs),
            f"{family}_probe": round(gbs / probe, 3),
        }
    report.row(matvec=what, mb=round(planes[0].nbytes / 1e6, 1), **cells)


def by_each(planes: list[Any], x: torch.Tensor, rows: int, device: torch.device, cells: dict[str, Any]) -> dict[str, float]:
    """Seconds of x W^T by each family; one that fails says so in `cells`, and the others are timed all the same."""
    out = torch.empty(x.shape[0], rows, device=device)

    def cuda(path: int) -> Callable[[Any], Any]:
        held = cuda_kernels.quantize(x)
        return lambda w: cuda_kernels.matmul(held, w, out, path=path)

    def triton() -> Callable[[Any], Any]:
        project = timing.triton_project()
        return lambda w: project(x, w, out)

    ways = {"cuda": lambda: cuda(cuda_kernels.MATVEC), "mma": lambda: cuda(cuda_kernels.MMA), "triton": triton}
    if x.shape[0] > cuda_kernels.MATVEC_MOST:
        del ways["cuda"]
    found = {}
    for family, make in ways.items():
        try:
            found[family] = timing.over(planes, make(), device)
        except Exception as problem:
            cells[f"{family}_failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
    return found


def many_rows(device: torch.device, report: Report, shape: tuple[GGMLType, int, int], count: int) -> None:
    """`count` rows: microseconds by each path, quantization of the rows apart."""
    planes = timing.copies(*shape, device)
    x = torch.randn(count, shape[2], device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    cells: dict[str, Any] = {}
    found = by_each(planes, x, shape[1], device, cells)
    if "mma" in found:
        found["quantize"] = timing.over([x], cuda_kernels.quantize, device)
    report.row(
        rows=count,
        type=shape[0].name,
        **cells,
        **{f"{family}_us": round(seconds * 1e6, 1) for family, seconds in found.items()},
    )


def load(device: torch.device, report: Report) -> None:
    """A file of 1B from disk and from the system's memory to the device: raw reads, with copies, and to a model."""
    from bench import gpu_load, make_model

    report.attempt("csrc/cuda", lambda: library(device))
    shape = make_model.SHAPES["tiny" if device.type == "cpu" else "llama-1b"]
    gpu_load.run(device, ROOT / "build" / f"{shape.name}.gguf", shape, report.row)


def end_to_end(device: torch.device, report: Report) -> None:
    """Decode and prefill of random models in Q4_K_M, made on the device, through the engine. On a CPU by the CPU's kernels:
    what is interpreted would take minutes."""
    from bench import gpu_engine

    report.attempt("csrc/cuda", lambda: library(device))
    for family in ("csrc",) if device.type == "cpu" else ("csrc", "triton"):
        report.attempt(family, lambda f=family: gpu_engine.run(device, f, report.row))


def llama(device: torch.device, report: Report) -> None:
    """llama-bench on a 1B file of the shapes that `e2e` has, where LLAMA_CPP_BIN says where it is; 8B is 4.9 GB to write."""
    folder = os.environ.get("LLAMA_CPP_BIN", "")
    if not folder:
        report["skipped"] = "LLAMA_CPP_BIN is not set"
        return
    from bench import make_model

    small = device.type == "cpu"
    shape = make_model.SHAPES["tiny" if small else "llama-1b"]
    path = make_model.make(ROOT / "build" / f"{shape.name}.gguf", shape, "Q4_K_M")
    sizes = ["-ngl", "0", "-p", "8", "-n", "2"] if small else ["-ngl", "99", "-fa", "1", "-p", "512", "-n", "128"]
    done = subprocess.run([f"{folder}/llama-bench", "-m", str(path), *sizes, "-o", "json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama-bench: {done.stderr[-1500:]}")
    for row in json.loads(done.stdout):
        report.row(model=shape.name, prompt=row["n_prompt"], generated=row["n_gen"], tokens_per_second=round(row["avg_ts"], 1))


STEPS = {"build": build, "kernels": kernels, "time": time_kernels, "load": load, "e2e": end_to_end, "llama": llama}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report = Report(args.out)
    STEPS[args.step](torch.device(args.device), report)
    report.end()


if __name__ == "__main__":
    main()
