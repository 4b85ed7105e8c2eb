"""Compiles every kernel as its launcher would launch it, for GPUs that need not be there, and compares what it takes of them.

`python -m tests.triton.compiled` checks the figures against budget.json: registers, shared memory and stack must not grow;
stack, which is spilled registers, must be zero, and tensor cores must be used where they are meant to be. `--all` adds every
type of weight, `--write` records new figures, `--show` prints the table, `--only TEXT` takes the cases whose name has it.

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
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ollamapy.engine.batch import LayerState
from ollamapy.engine.editor import Editor
from ollamapy.engine.protocol import SamplingParams
from ollamapy.engine.sequence import Sequence
from ollamapy.gguf.types import GGMLType
from ollamapy.reference import Routing
from ollamapy.triton_kernels import (
    activation,
    attention,
    attention_plan,
    cache,
    decode,
    edits,
    embedding,
    layout,
    linear,
    moe,
    norm,
    place,
    rope,
    sampling,
    tuning,
)
from ollamapy.triton_kernels.forms import FORMS
from tests.models.paged import make_batch
from tests.triton.data import random_weight

BUDGET = Path(__file__).with_name("budget.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = {80: 163, 90: 227, 100: 227, 120: 99}
"""Compute capability -> KiB of shared memory that a program can have."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
ROUNDED = ("edit_kernel",)  # whose bits are to be the host's
INT8_CORES = "IMMA"  # products batched by group stay with mma.sync, on every architecture

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
        store = cache.new_cache(LayerState(kv_heads, length, length), 1, 16, dtype, CPU)  # nothing reads it
        q = bf16(sum(queries), heads, length).to(torch.float32 if dtype == torch.float32 else torch.bfloat16)
        return attention.attention(q, store, attention_plan.plan(batch, store), scale=0.1, **options)

    return call


def turn(heads: int = 32, kv_heads: int = 8, length: int = 128, dtype: torch.dtype = torch.bfloat16) -> object:
    """A decoding step's heads to their places, with everything that a model can ask of it."""
    store = cache.new_cache(LayerState(kv_heads, length, length), 2, 16, dtype, CPU)
    qkv = bf16(4, (heads + 2 * kv_heads) * length)
    norms = torch.zeros(length)
    angles = place.Turn(torch.zeros(64, length), False, norms, norms, 1e-6)
    return place.place(qkv, heads, angles, torch.arange(4), torch.zeros(4), store, torch.arange(4))


def edit() -> None:
    """Of two rows with a list each."""
    logits = torch.zeros(2, 128256)
    params = SamplingParams(repeat_penalty=1.1, suppress_ids=(7, 8))
    changes = Editor().of([Sequence(0, array("q", [1, 2, 3]), params, 99)] * 2, logits)
    assert changes is not None
    edits.edit(logits, changes)


def mix(tokens: int) -> object:
    """Experts for few or many tokens: a matvec each, or tiles."""
    gate, up, down = (layout.pack(random_weight(GGMLType.MXFP4, 4, 512, 512, seed=seed)) for seed in range(3))
    experts = moe.Experts(gate, up, down, layout.join([gate, up]))
    x = bf16(tokens, 512)
    return moe.mix(x, torch.zeros(tokens, 4), experts, Routing(2), "silu", torch.zeros(tokens, 512), True)


def multiply(type: GGMLType, rows: int, **more: Any) -> Callable[[], object]:
    """K = 4096; sixteen rows of W are enough: no kernel is specialized on their number."""

    def call() -> object:
        planes = layout.pack(random_weight(type, 32 if "gate" in more else 16, 4096))
        return linear.project(bf16(rows, 4096), planes, torch.zeros(rows, 16), **more)

    return call


def multiply_precisely(type: GGMLType, rows: int) -> Callable[[], object]:
    def call() -> object:
        planes = linear.prepare_precise(random_weight(type, 16, 4096), CPU)
        return linear.project(torch.zeros(rows, 4096), planes, torch.zeros(rows, 16), add=True)

    return call


def multiply_int8(type: GGMLType, rows: int) -> Callable[[], object]:
    return lambda: linear.int8_matmul(bf16(rows, 4096), layout.pack(random_weight(type, 16, 4096)), torch.zeros(rows, 16))


def decode_all(type: GGMLType) -> Callable[[], object]:
    return lambda: embedding.dequantize(layout.pack(random_weight(type, 16, 4096)))


def usual_cases() -> dict[str, Case]:
    """The types and shapes of the models most used."""
    rows = {GGMLType.Q4_K: [2, 4, 16, 32, 64], GGMLType.Q6_K: [1, 4, 16, 64, 128], GGMLType.Q8_0: [1, 4, 128]}
    found: dict[str, Case] = {}
    for type, counts in rows.items():
        for count in counts:
            found[f"linear {type.name} {count} row{'s' if count > 1 else ''}"] = multiply(type, count), count >= 64
    for type in (GGMLType.Q4_K, GGMLType.Q6_K):
        for count in (1, 16, 64):
            found[f"linear precise {type.name} {count} row{'s' if count > 1 else ''}"] = multiply_precisely(type, count), False
        found[f"linear int8 {type.name} 32 rows"] = multiply_int8(type, 32), True
    return found | {
        "linear Q4_K 1 row onto the stream": (multiply(GGMLType.Q4_K, 1, add=True), False),
        "gate and up Q4_K 1 row": (multiply(GGMLType.Q4_K, 1, gate="silu"), False),
        "linear Q4_K 128 rows": (multiply(GGMLType.Q4_K, 128), True),
        "linear int8 Q4_K 16 rows": (multiply_int8(GGMLType.Q4_K, 16), True),
        "dequantize Q4_K": (decode_all(GGMLType.Q4_K), False),
        "attention decode, split": (attend([1], [3000], 32, 8, 128, dtype=torch.float16), False),
        "attention prefill, 32/8 heads of 128": (attend([200], [300], 32, 8, 128), True),
        "place, 32/8 heads of 128": (turn, False),
        "add_norm of 4096": (lambda: norm.add_norm(bf16(2, 4096), bf16(2, 4096), 1e-5, bf16(4096), bf16(4096)), False),
        "experts MXFP4, 2 tokens": (lambda: mix(2), False),
        "draw": (lambda: sampling.draw(torch.zeros(2, 128256), [SamplingParams()] * 2, np.zeros(2)), False),
        "dequantize Q6_K": (decode_all(GGMLType.Q6_K), False),
        "attention decode, 32/8 heads of 128": (attend([1], [100], 32, 8, 128), False),
        "attention decode, sinks": (attend([1], [100], 64, 8, 64, sinks=torch.zeros(64)), False),
        "attention decode, q8_0": (attend([1], [3000], 32, 8, 128, dtype=cache.Q8_0), False),
        "attention decode, float32": (attend([1], [3000], 32, 8, 128, dtype=torch.float32), False),
        "attention prefill, float32": (attend([200], [300], 32, 8, 128, dtype=torch.float32), False),
        "attention prefill, float32, 4/1 heads of 256": (attend([200], [300], 4, 1, 256, dtype=torch.float32), False),
        "attention decode, fp8": (attend([1], [3000], 32, 8, 128, dtype=torch.float8_e4m3fn), False),
        "attention prefill, fp8": (attend([200], [300], 32, 8, 128, dtype=torch.float8_e4m3fn), True),
        "attention of a few on a long context, fp8": (attend([4], [3000], 32, 8, 128, dtype=torch.float8_e4m3fn), False),
        "place, fp8": (lambda: turn(dtype=torch.float8_e4m3fn), False),
        "attention decode, 4/1 heads of 256, window, cap": (attend([1], [100], 4, 1, 256, window=64, cap=50.0), False),
        "attention prefill, 8/8 heads of 64, window, sinks": (
            attend([200], [300], 8, 8, 64, window=128, sinks=torch.zeros(8)),
            True,
        ),
        "attention prefill, 8/4 heads of 256, cap": (attend([200], [300], 8, 4, 256, cap=50.0), True),
        "attention prefill, q8_0": (attend([200], [300], 32, 8, 128, dtype=cache.Q8_0), True),
        "attention decode, 64k": (attend([1], [65536], 32, 8, 128), False),
        "attention decode, 256k, window, sinks": (attend([1], [262144], 64, 8, 64, window=128, sinks=torch.zeros(64)), False),
        "attention of a few on a long context": (attend([4], [3000], 32, 8, 128), False),
        "attention of a few on a long context, heads of 256": (attend([4], [3000], 8, 4, 256, cap=50.0), False),
        "attention of a few on a long context, q8_0": (attend([4], [3000], 32, 8, 128, dtype=cache.Q8_0), False),
        "place, q8_0": (lambda: turn(dtype=cache.Q8_0), False),
        "quantize 4096": (lambda: norm.quantize(bf16(2, 4096), bf16(4096), 1e-5), False),
        "gated_activation": (lambda: activation.gated_activation(bf16(2, 14336), bf16(2, 14336), "silu"), False),
        "softcap": (lambda: activation.softcap(torch.zeros(2, 1024), 30.0), False),
        "rope": (
            lambda: rope.rope(bf16(2, 32, 128), bf16(2, 8, 128), torch.zeros(2, 1, 128), torch.zeros(2, 1, 128), False),
            False,
        ),
        "experts MXFP4, 64 tokens": (lambda: mix(64), False),
        "told": (lambda: sampling.told(torch.zeros(2, 128256), torch.arange(2), torch.arange(2), 20), False),
        "edits": (edit, False),
        "masks": (lambda: edits.forbid(torch.zeros(2, 128256), [1, 0], np.zeros((2, 4008), dtype=np.int32)), False),
    }


def every_type() -> dict[str, Case]:
    """Of the types whose kernels differ by nothing but the numbers in a table, the first."""
    found: dict[str, Case] = {}
    tables = [tuning.read(tuning.name_for(architecture)) for architecture in ARCHITECTURES]
    alike: dict[str, GGMLType] = {}
    for type, form in FORMS.items():
        own = [table.by_type.get(type.name) for table in tables]
        alike.setdefault(repr((decode.constants(form._replace(table=(0, any(form.table), 0, 0))), form.step, own)), type)
    for type in alike.values():
        for count in (1, 4, 16, 128):
            found[f"linear {type.name} {count} row{'s' if count > 1 else ''}"] = multiply(type, count), count >= 64
        found[f"linear int8 {type.name} 16 rows"] = multiply_int8(type, 16), True
        found[f"dequantize {type.name}"] = decode_all(type), False
    return found


def cases(every: bool) -> dict[str, Case]:
    return every_type() | usual_cases() if every else usual_cases()


def skipped(name: str, architecture: int) -> bool:
    return "fp8" in name and architecture < 89  # no instruction converts it


def said(tool: str, *options: str, of: bytes) -> str:
    """What one of NVIDIA's tools tells of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(of)
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def figures(name: str, architecture: int, every: bool) -> tuple[str, int, dict[str, list[int]], list[str]]:
    """Kernel -> [registers, shared, stack] for one case, and what is wrong with them in any case."""
    call, tensor_cores = cases(every)[name]
    compiled: list[Any] = []
    driver.set_active(Target(architecture))
    table = tuning.read(tuning.name_for(architecture))
    tuning.of = lambda device: table
    tuning.activations = lambda device, precise=False: torch.float32 if precise else getattr(torch, table.activations)

    def compile_only(self: JITFunction, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: compiled.append(self.run(*args, grid=grid, warmup=True, **kwargs))

    JITFunction.__getitem__ = compile_only
    torch.empty = torch.zeros  # what a kernel would have written, nobody writes
    try:
        call()
    except Exception as error:  # whatever the compiler raises: the other cases are told too
        return name, architecture, {}, [f"does not compile: {str(error)[-1500:]}"]
    found: dict[str, list[int]] = {}
    wrong: list[str] = []
    meant = {"matmul_kernel": TENSOR_CORES[architecture], "attention_kernel": TENSOR_CORES[architecture]}
    meant["int8_kernel"] = INT8_CORES
    for kernel in {id(kernel): kernel for kernel in compiled}.values():
        usage = said("cuobjdump", "-res-usage", of=kernel.asm["cubin"])
        match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert match is not None, usage
        registers, stack = map(int, match.groups())
        before = found.get(kernel.name, [0, 0, 0])  # a kernel may be launched twice, in two forms
        found[kernel.name] = [max(pair) for pair in zip(before, [registers, kernel.metadata.shared, stack], strict=True)]
        if stack:
            wrong.append(f"{kernel.name} spills {stack} bytes")
        if kernel.metadata.shared > ARCHITECTURES[architecture] * 1024:
            wrong.append(f"{kernel.name} wants {kernel.metadata.shared} bytes of shared memory")
        if kernel.name in ROUNDED and re.search(r"fma|div\.(full|approx)", kernel.asm["ptx"]):
            wrong.append(f"{kernel.name} rounds otherwise than the host")
        if tensor_cores and kernel.name in meant and meant[kernel.name] not in said("nvdisasm", of=kernel.asm["cubin"]):
            wrong.append(f"{kernel.name} has no {meant[kernel.name]}")  # asked for only here: 0.3 s a kernel
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


def compiled_cases(every: bool, only: str) -> list[tuple[str, int, dict[str, list[int]], list[str]]]:
    names = [name for name in cases(every) if only in name]
    jobs = [(name, arch, every) for name in names for arch in ARCHITECTURES if not skipped(name, arch)]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(figures, *zip(*jobs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("--write", "--all", "--show"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--only", default="")
    chosen = parser.parse_args()
    start = time.perf_counter()
    results = compiled_cases(chosen.all, chosen.only)
    known = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"kernels": {}}
    same_compiler = known.get("triton") == triton.__version__  # other versions may need other figures, never spills
    anew = chosen.write and chosen.all and not chosen.only  # what is no case any more goes
    table: dict[str, Any] = known["kernels"] if same_compiler and not anew else {}
    problems = []
    for name, architecture, found, wrong in results:
        if chosen.write:
            table.setdefault(name, {})[str(architecture)] = found
        elif same_compiler:
            wrong = wrong + grown(table, name, architecture, found)
        problems += [f"{name}, sm_{architecture}: {problem}" for problem in wrong]
        if chosen.show:
            print(f"{name:52} sm_{architecture:<4}", *(f"{kernel} {numbers}" for kernel, numbers in found.items()))
    if chosen.write:
        lines = [f" {json.dumps(name)}: {json.dumps(by)}" for name, by in sorted(table.items())]
        text = f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"
        BUDGET.write_text(text)
    print(f"{len(results)} cases compiled in {time.perf_counter() - start:.0f} s")
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
