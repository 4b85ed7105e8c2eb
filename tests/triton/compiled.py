"""Compiles every kernel as its launcher would launch it, for GPUs that need not be there, and compares what it takes of them.

`python -m tests.triton.compiled` checks the figures against budget.json: registers, shared memory and stack must not grow;
stack, which is spilled registers, must be zero, and tensor cores must be used where they are meant to be. `--write` records new
figures, `--all` takes all types and tiles, `--show` prints the table.

Launchers are called with tensors on the CPU; instead of a launch there is a compilation with the very specialization
(alignment of pointers, divisibility of sizes) that the launch would have had.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ollamapy.engine.batch import LayerState
from ollamapy.gguf.types import GGMLType
from ollamapy.reference import Routing
from ollamapy.triton_kernels import activation, attention, cache, embedding, layout, linear, moe, norm, place, tuning
from tests.models.paged import make_batch
from tests.triton.data import random_weight

BUDGET = Path(__file__).with_name("budget.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = {80: 163, 90: 227, 100: 227, 120: 99}
"""Compute capability -> KiB of shared memory that a program can have."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}

CPU = torch.device("cpu")
Case = tuple[Callable[[], object], bool]
"""A call of a launcher; whether it must use the tensor cores as that architecture means them to be used."""


class Target:
    """A driver that knows its GPU and has none."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """Kernels are kept by device, with their target."""
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        return 0


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


def attend(
    queries: list[int],
    contexts: list[int],
    heads: int,
    kv_heads: int,
    length: int,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Callable[[], object]:
    def call() -> object:
        tables = [list(range(-(-context // 16))) for context in contexts]
        batch = make_batch(tables, queries, contexts, 16)
        store = cache.new_cache(LayerState(kv_heads, length, length), len(tables[0]), 16, dtype, CPU)
        return attention.attention(bf16(sum(queries), heads, length), store, attention.plan(batch, store), scale=0.1, **options)

    return call


def turn(heads: int = 32, kv_heads: int = 8, length: int = 128, dtype: torch.dtype = torch.bfloat16) -> object:
    """A decoding step's heads to their places, with everything that a model can ask of it."""
    store = cache.new_cache(LayerState(kv_heads, length, length), 2, 16, dtype, CPU)
    qkv = bf16(4, (heads + 2 * kv_heads) * length)
    norms = torch.zeros(length)
    angles = place.Turn(torch.zeros(64, length), False, norms, norms, 1e-6)
    return place.place(qkv, heads, angles, torch.arange(4), torch.zeros(4), store, torch.arange(4))


def mix() -> object:
    gate, up, down = (layout.pack(random_weight(GGMLType.MXFP4, 4, 512, 512, seed=seed)) for seed in range(3))
    return moe.moe(bf16(64, 512), torch.zeros(64, 4), (gate, up, down), Routing(2), "silu")


def of_weights(type: GGMLType, rows: list[int]) -> dict[str, Case]:
    """K = 4096; sixteen rows of W are enough: no kernel is specialized on their number."""
    cases: dict[str, Case] = {}
    for count in rows:
        name = f"linear {type.name} {count} row{'s' if count > 1 else ''}"
        planes = lambda: layout.pack(random_weight(type, 16, 4096))  # noqa: E731
        cases[name] = (lambda count=count, planes=planes: linear.linear(bf16(count, 4096), planes())), count >= 64
    cases[f"dequantize {type.name}"] = (lambda: embedding.dequantize(layout.pack(random_weight(type, 16, 4096)))), False
    return cases


def all_cases(every: bool) -> dict[str, Case]:
    rows = {GGMLType.Q4_K: [1, 4, 64, 128], GGMLType.Q6_K: [1]}
    cases: dict[str, Case] = {}
    for type in layout.FORMS:
        if every or type in rows:
            cases |= of_weights(type, [1, 2, 3, 4, 16, 32, 64, 128] if every else rows[type])
    cases |= {
        "attention decode, split": (attend([1], [3000], 32, 8, 128), False),
        "attention prefill, 32/8 heads of 128": (attend([200], [300], 32, 8, 128), True),
        "attention prefill, 8/4 heads of 256, cap": (attend([200], [300], 8, 4, 256, cap=50.0), True),
        "place, 32/8 heads of 128": (turn, False),
        "moe MXFP4, 4 experts, 64 rows": (mix, False),
    }
    return cases | more_cases() if every else cases


def more_cases() -> dict[str, Case]:
    return {
        "attention decode, 32/8 heads of 128": (attend([1], [100], 32, 8, 128), False),
        "attention decode, 4/1 heads of 256, window, cap": (attend([1], [100], 4, 1, 256, window=64, cap=50.0), False),
        "attention prefill, 8/8 heads of 64, window, sinks": (
            attend([200], [300], 8, 8, 64, window=128, sinks=torch.zeros(8)),
            True,
        ),
        "attention prefill, float32, 8/4 heads of 128": (attend([200], [300], 8, 4, 128, dtype=torch.float32), False),
        "add_norm of 4096": (lambda: norm.add_norm(bf16(2, 4096), bf16(2, 4096), 1e-5, bf16(4096)), False),
        "gated_activation": (lambda: activation.gated_activation(bf16(2, 14336), bf16(2, 14336), "silu"), False),
        "softcap": (lambda: activation.softcap(torch.zeros(2, 1024), 30.0), False),
    }


def disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tools = ([TOOLS / "cuobjdump", "-res-usage"], [TOOLS / "nvdisasm"])
        usage, sass = (subprocess.run([*tool, file.name], capture_output=True, text=True, check=True).stdout for tool in tools)
    return usage, sass


def figures(name: str, architecture: int, every: bool) -> tuple[str, int, dict[str, list[int]], list[str]]:
    """Kernel -> [registers, shared, stack] for one case, and what is wrong with them in any case."""
    call, tensor_cores = all_cases(every)[name]
    compiled: list[Any] = []
    driver.set_active(Target(architecture))
    table = tuning.read(tuning.name_for(architecture))
    tuning.of = lambda device: table
    tuning.activations = lambda device: getattr(torch, table.activations)

    def compile_only(self: JITFunction, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: compiled.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    JITFunction.__getitem__ = compile_only
    call()
    found, wrong = {}, []
    for kernel in compiled:
        usage, sass = disassemble(kernel.asm["cubin"])
        match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert match is not None, usage
        registers, stack = map(int, match.groups())
        found[kernel.name] = [registers, kernel.metadata.shared, stack]
        if stack or "STL" in sass:
            wrong.append(f"{kernel.name} spills {stack} bytes")
        if kernel.metadata.shared > ARCHITECTURES[architecture] * 1024:
            wrong.append(f"{kernel.name} wants {kernel.metadata.shared} bytes of shared memory")
        if tensor_cores and kernel.name in ("matmul_kernel", "attention_kernel") and TENSOR_CORES[architecture] not in sass:
            wrong.append(f"{kernel.name} has no {TENSOR_CORES[architecture]}")
    return name, architecture, found, wrong


def grown(known: dict[str, Any], name: str, architecture: int, found: dict[str, list[int]]) -> list[str]:
    problems = []
    for kernel, now in found.items():
        before = known.get(name, {}).get(str(architecture), {}).get(kernel)
        if before is None:
            problems.append(f"{kernel} is not in the budget; record it with --write")
        elif any(a > b for a, b in zip(now, before, strict=True)):
            problems.append(f"{kernel} grew from {before} to {now} [registers, shared, stack]")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--write", "--all", "--show"):
        parser.add_argument(flag, action="store_true")
    chosen = parser.parse_args()
    jobs = [(name, architecture, chosen.all) for name in all_cases(chosen.all) for architecture in ARCHITECTURES]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        results = list(pool.map(figures, *zip(*jobs, strict=True), chunksize=len(ARCHITECTURES)))
    known = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    same_compiler = known.get("triton") == triton.__version__  # other versions may need other figures, never spills
    table: dict[str, Any] = {}
    problems = []
    for name, architecture, found, wrong in results:
        table.setdefault(name, {})[str(architecture)] = found
        if same_compiler and not chosen.write and (name in known["kernels"] or not chosen.all):
            wrong = wrong + grown(known["kernels"], name, architecture, found)
        problems += [f"{name}, sm_{architecture}: {problem}" for problem in wrong]
        if chosen.show:
            print(f"{name:52} sm_{architecture:<4}", *(f"{kernel} {numbers}" for kernel, numbers in found.items()))
    if chosen.write:
        kernels = dict(sorted({**known.get("kernels", {}), **table}.items()))
        BUDGET.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")
    print(f"{len(results)} cases compiled")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
