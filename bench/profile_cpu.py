"""Where a step's time goes: by phase of the engine, and an estimate of what is inside the fused decoder call.

    python -m bench.profile_cpu --models smollm2,gemma3

Phases are timed around the engine's own calls. Inside the one call that runs all layers, matmuls and attention are timed by
running the same matrices and shapes one at a time; what is left is norms, rotation, activations, quantization of rows and
barriers (less than nothing where matrices run better together). Prints a table for each model, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cpu import MODELS, model_path
from bench.engine import LONGEST, Bench
from bench.figures import PROMPT
from bench.table import align
from ollamapy import ops
from ollamapy.engine import adapters
from ollamapy.engine.batch import Batch, LayerState
from ollamapy.gguf.types import GGMLType
from ollamapy.layers.layer import Layer, declared_tensors
from ollamapy.lifecycle.devices import physical_cores
from ollamapy.quant.tensor import QuantTensor

CONTEXT = 64  # tokens before the decode steps that are timed
STEPS = 24
PARTS = {
    "attn_q": "qkv",
    "attn_k": "qkv",
    "attn_v": "qkv",
    "attn_qkv": "qkv",
    "attn_output": "attention output",
    "ffn_gate": "gate and up",
    "ffn_up": "gate and up",
    "ffn_down": "down",
}


class Clock:
    """Times of named calls within a step; nested ones are counted in their outer one too."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    def around(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return fn(*args, **named)
            finally:
                self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start

        return timed


class CountOps(TorchDispatchMode):
    """Counts the operators that Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def instrument(bench: Bench, clock: Clock) -> None:
    """Wraps the calls that a step consists of."""
    engine, model = bench.engine, bench.model
    engine.scheduler.schedule = clock.around("schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
    engine.scheduler.commit = clock.around("commit", engine.scheduler.commit)  # type: ignore[method-assign]
    engine.execution.sampler.sample = clock.around("sample", engine.execution.sampler.sample)  # type: ignore[method-assign]
    engine.runner.logits = clock.around("logits", engine.runner.logits)  # type: ignore[method-assign]
    engine.runner.forward = clock.around("forward", engine.runner.forward)  # type: ignore[method-assign]
    adapters.build_batch = clock.around("build batch", adapters.build_batch)
    for stage in model._stages:
        if stage._stack is not None:
            stage._stack = clock.around("layers", stage._stack)


def one_step(bench: Bench, clock: Clock) -> dict[str, float]:
    clock.times = {}
    start = time.perf_counter()
    bench.engine.step()
    times = {"step": time.perf_counter() - start, **clock.times}
    layers = times.get("layers", times.get("forward", 0.0))
    times["embedding, last norm"] = times.get("forward", 0.0) - layers
    named = ("schedule", "build batch", "forward", "logits", "sample", "commit")
    times["other"] = times["step"] - sum(times.get(name, 0.0) for name in named)
    return times


def decode_phases(bench: Bench, clock: Clock, num_seqs: int) -> dict[str, float]:
    """Median seconds of each phase of a step that decodes `num_seqs` sequences, and "calls": operators a step calls."""
    ids = {bench.add(CONTEXT, LONGEST // 2) for _ in range(num_seqs)}
    started: set[int] = set()
    while started != ids:
        started |= {output.request_id for output in bench.outputs()}
    steps = [one_step(bench, clock) for _ in range(STEPS)]
    with CountOps() as counter:
        bench.engine.step()
    for request_id in ids:
        bench.engine.abort(request_id)
    bench.engine.step()
    return {**medians(steps), "calls": counter.count}


def prefill_phases(bench: Bench, clock: Clock) -> dict[str, float]:
    steps = []
    for _ in range(4):
        bench.add(PROMPT, 1)
        steps.append(one_step(bench, clock))
    bench.add(PROMPT, 1)
    with CountOps() as counter:
        bench.engine.step()
    return {**medians(steps[1:]), "calls": counter.count}


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in steps[0]}


def matmuls(bench: Bench, rows: int) -> dict[str, float]:
    """Seconds of all layers' matrices, by part, each run alone on `rows` rows: every matrix once per round, so that none is
    in a cache that it would not be in."""
    found: dict[str, list[float]] = {}
    call = call_cost()
    layers: list[tuple[str, Layer]] = [
        (PARTS[path.split(".")[-2]], layer)
        for path, layer, key, _ in declared_tensors(bench.model)
        if key == "weight" and path.split(".")[-2] in PARTS
    ]
    inputs = {layer.weight.shape[1]: torch.randn(rows, layer.weight.shape[1]) for _, layer in layers}  # type: ignore[attr-defined]
    for _ in range(3):
        sums = dict.fromkeys(dict.fromkeys(PARTS.values()), 0.0)
        for part, layer in layers:
            weight = layer.weight  # type: ignore[attr-defined]
            start = time.perf_counter()
            ops.linear(inputs[weight.shape[1]], weight)
            sums[part] += max(time.perf_counter() - start - call, 0.0)
        for part, seconds in sums.items():
            found.setdefault(part, []).append(seconds)
    return {part: min(times) for part, times in found.items()}


def call_cost() -> float:
    """Seconds that calling a matmul from Python takes: that of 16 x 32 weights. The one call for all layers pays it once."""
    zeros = QuantTensor(torch.zeros(16, 128, dtype=torch.uint8), GGMLType.F32, (16, 32))
    weight = ops.prepare(zeros, torch.device("cpu"), "linear")
    assert isinstance(weight, ops.Weight)
    x = torch.zeros(1, 32)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        ops.linear(x, weight)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def attention(bench: Bench, num_seqs: int, query: int, context: int) -> float:
    """Seconds of all layers' attention, run alone; `query` new tokens of each sequence, `context` with them."""
    per_layer: dict[tuple[LayerState, int], list[float]] = {}
    call, total = call_cost(), 0.0
    for block in bench.model.blk:
        spec = block.spec.attention
        key = (block.state, spec.num_heads)
        if key not in per_layer:
            per_layer[key] = [attention_call(block, num_seqs, query, context) for _ in range(3)]
        total += max(min(per_layer[key]) - call, 0.0)
    return total


def attention_call(block: Any, num_seqs: int, query: int, context: int) -> float:
    blocks = -(-context // 16)
    spec, device = block.spec.attention, torch.device("cpu")
    cache = ops.new_cache(block.state, num_seqs * blocks, 16, torch.float16, device)
    batch = even_batch(num_seqs, query, context, blocks)
    q = torch.randn(num_seqs * query, spec.num_heads, spec.key_length)
    plan = ops.plan_attention(batch, cache)
    start = time.perf_counter()
    ops.attention(q, cache, plan, scale=spec.scale, window=spec.window, cap=spec.softcap, causal=spec.causal)
    return time.perf_counter() - start


def even_batch(num_seqs: int, query: int, context: int, blocks: int) -> Batch:
    rows: Tensor = torch.arange(num_seqs * query)
    table = torch.arange(num_seqs * blocks, dtype=torch.int32).view(num_seqs, blocks)
    positions = context - query + rows % query
    slots = table.flatten()[rows // query * blocks + positions // 16].long() * 16 + positions % 16
    starts = torch.arange(num_seqs + 1, dtype=torch.int32) * query
    lens = torch.full((num_seqs,), context, dtype=torch.int32)
    return Batch(rows, positions, slots, table, starts, lens, rows, [query] * num_seqs, [context] * num_seqs)


def profile(name: str, path: Path, threads: int, batches: list[int]) -> dict[str, Any]:
    bench, clock = Bench(path, threads), Clock()
    inside: dict[str, dict[str, float]] = {}
    with torch.inference_mode():
        for size in batches:
            inside[f"decode{size}"] = {**matmuls(bench, size), "attention": attention(bench, size, 1, CONTEXT + STEPS // 2)}
        inside["prefill512"] = {**matmuls(bench, PROMPT), "attention": attention(bench, 1, PROMPT, PROMPT)}
    instrument(bench, clock)
    phases = {f"decode{size}": decode_phases(bench, clock, size) for size in batches}
    phases["prefill512"] = prefill_phases(bench, clock)
    for column, own in phases.items():
        layers = own.get("layers", own["forward"])
        inside[column]["rest of the layers"] = layers - sum(inside[column].values())
    return {"name": name, "kernels": ops.chosen()["linear"], "phases": phases, "layers": inside}


def render(found: dict[str, Any]) -> str:
    columns = list(found["phases"])
    rows = [[f"{found['name']}, us", *columns]]
    order = ("schedule", "build batch", "embedding, last norm", "layers", "logits", "sample", "commit", "other")
    for phase in order:
        rows.append([phase, *(cell(found["phases"][column], phase) for column in columns)])
        if phase == "layers":
            for part in found["layers"][columns[0]]:
                rows.append([f"- {part}", *(cell(found["layers"][column], part) for column in columns)])
    rows.append(["step", *(f"{found['phases'][column]['step'] * 1e6:.0f}" for column in columns)])
    rows.append(["calls from Python", *(str(found["phases"][column]["calls"]) for column in columns)])
    return "\n".join(align(rows))


def cell(times: dict[str, float], phase: str) -> str:
    seconds, whole = times.get(phase, 0.0), times.get("step")
    share = f" ({seconds / whole * 100:.0f}%)" if whole else ""
    return f"{seconds * 1e6:.0f}{share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "ollamapy" / "bench", help="of random models")
    args = parser.parse_args()
    found = []
    for name in args.models.split(","):
        path = model_path(name, args.folder)
        found.append(profile(name, path, args.threads, [int(size) for size in args.batches.split(",")]))
        print(render(found[-1]), end="\n\n", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
