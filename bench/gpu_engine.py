"""The engine on a GPU with a random model that is made there: tokens/s by batch, with graphs and without, and prompts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import make_model
from bench.gpu_timing import random_weight
from bench.make_model import SHAPES, Shape
from ollamapy import ops
from ollamapy.engine.accelerator import Accelerator, accelerator
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import Plan, SamplingParams, Step
from ollamapy.gguf.types import GGMLType
from ollamapy.layers.layer import declared_tensors
from ollamapy.models.config import ModelConfig
from ollamapy.models.llama import Llama
from ollamapy.quant.tensor import QuantTensor

SHAPE_8B = Shape("random-llama-8b", 32, 4096, 14336, 32, 8, 128, 128256)
BLOCK = 16
WARM_STEPS = 6  # a bucket is recorded at its second use


def make(shape: Shape, device: torch.device, family: str) -> Llama:
    """The model of `make_model` in Q4_K_M, without a file; embedding and head are one matrix in two forms."""
    named = {name: (type, size) for name, type, size, _ in make_model.tensors(shape, "Q4_K_M")}
    config = ModelConfig.from_gguf(make_model.metadata(shape, "Q4_K_M"))
    ops.choose(device, family, (shape.head,))
    model = Llama(config, {name: size for name, (_, size) in named.items()})
    model.place(device)
    for name, layer, key, declared in declared_tensors(model):
        type, size = named[(declared.sources or (name,))[0]]
        if type is GGMLType.F32:
            weight = QuantTensor(torch.ones(size, device=device).view(torch.uint8), type, size)
        else:
            weight = random_weight(type, size[0], size[1], device)
        layer.load(key, ops.prepare(weight, device, declared.use))
    model.prepare()
    return model


MODES = {"graphs": (True, True), "launches": (False, True), "one by one": (False, False)}
"""Recorded steps that overlap, as a server has them; each kernel launched by itself; and tokens read before the next step."""


class Watched:
    """An accelerator that adds up the time the host waits for tokens: what is left of a step is the host's own work."""

    def __init__(self, inner: Accelerator) -> None:
        self._inner, self.waited = inner, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        get = self._inner.fetch(tensor)

        def wait() -> Tensor:
            start = time.perf_counter()
            found = get()
            self.waited += time.perf_counter() - start
            return found

        return wait


def decode(engine: Engine, watched: Watched, count: int, steps: int, vocab: int) -> tuple[dict[str, float], list[list[int]]]:
    """Figures of `count` sequences past their prompts, and the tokens that they gave."""
    numbers = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=4 * steps + 8, speculation="off")
    tokens: list[list[int]] = [[] for _ in range(count)]
    for request_id in range(count):
        engine.add(request_id, [numbers.randrange(vocab) for _ in range(8)], params)
    while not all(tokens):
        _step(engine, tokens)
    for _ in range(WARM_STEPS):
        _step(engine, tokens)
    start, done, watched.waited = time.perf_counter(), sum(map(len, tokens)), 0.0
    for _ in range(steps):
        _step(engine, tokens)
    seconds = time.perf_counter() - start
    done = sum(map(len, tokens)) - done
    for request_id in range(count):
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
    cells = {
        "tokens_per_second": round(done / seconds, 1),
        "step_ms": round(1e3 * seconds / steps, 3),
        "waited_ms": round(1e3 * watched.waited / steps, 3),
    }
    return cells, tokens


def _step(engine: Engine, tokens: list[list[int]]) -> None:
    for event in engine.step():
        if isinstance(event, Step):
            for output in event.outputs:
                if output.finish is None:
                    tokens[output.request_id] += output.token_ids


def prefill(engine: Engine, length: int, vocab: int) -> float:
    """Tokens/s from a prompt to its first token."""
    best = 0.0
    for request_id in range(3):
        engine.add(request_id, [random.randrange(vocab) for _ in range(length)], SamplingParams(temperature=0.0, max_tokens=1))
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        best = max(best, length / (time.perf_counter() - start))
    return best


def run(device: torch.device, family: str, row: Callable[..., None]) -> None:
    """The 8B model with up to 64 sequences, and prompts; the 1B model with one, as llama.cpp is timed."""
    if device.type == "cpu":
        _measure(device, family, row, SHAPES["tiny"], [1, 3], [8])
        return
    _measure(device, family, row, SHAPE_8B, [1, 8, 32, 64], [512, 2048, 4096])
    _measure(device, family, row, SHAPES["llama-1b"], [1], [512])


def _measure(
    device: torch.device, family: str, row: Callable[..., None], shape: Shape, batches: list[int], prompts: list[int]
) -> None:
    start = time.perf_counter()
    model = make(shape, device, family)
    row(made=shape.name, family=family, seconds=round(time.perf_counter() - start, 1), kernels=ops.chosen())
    facts, steps = {"model": shape.name, "family": family}, 4 if device.type == "cpu" else 64
    tokens: dict[int, list[list[int]]] = {}  # by batch: those of the first mode
    for mode, (graphs, overlap) in MODES.items():
        watched = Watched(_accelerator(device))
        engine = Engine(model, _plan(device, graphs, overlap), ops.chosen(), accelerator=watched)
        for count in batches:
            cells, found = decode(engine, watched, count, steps, shape.vocab)
            length = min(len(each) for each in (*found, *tokens.setdefault(count, found)))
            same = sum(a[:length] == b[:length] for a, b in zip(found, tokens[count], strict=True))
            row(batch=count, **facts, mode=mode, **cells, same_answers=f"{same} of {count}")
        row(**facts, mode=mode, recorded=engine.stats().graphs)
        if graphs:
            for length in prompts:
                row(prompt=length, **facts, tokens_per_second=round(prefill(engine, length, shape.vocab), 1))
        del engine  # its KV cache goes before the next one is made


def _accelerator(device: torch.device) -> Accelerator:
    """On a CPU the tests' stand-in: recorded steps are called again."""
    found = accelerator(device)
    if found is None:
        from tests.engine.device import Emulated

        return Emulated()
    return found


def _plan(device: torch.device, graphs: bool, overlap: bool) -> Plan:
    small = device.type == "cpu"
    blocks, context, budget = (64, 128, 64) if small else (2048, 8192, 2048)
    return Plan(
        "",
        device=str(device),
        block_size=BLOCK,
        kv_dtype="f32" if small else "f16",
        prefix_cache=False,
        cuda_graphs=graphs,
        overlap=overlap,
        num_blocks=blocks,
        context_length=context,
        max_batch_tokens=budget,
    )
