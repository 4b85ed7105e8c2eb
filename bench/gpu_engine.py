"""The engine on a GPU with a random model that is made there: tokens a second by batch, and prompts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import make_model
from bench.gpu_timing import random_weight
from bench.make_model import SHAPES, Shape
from ollamapy import ops
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import Plan, SamplingParams, Step
from ollamapy.gguf.types import GGMLType
from ollamapy.layers.layer import declared_tensors
from ollamapy.models.config import ModelConfig
from ollamapy.models.llama import Llama
from ollamapy.quant.tensor import QuantTensor

SHAPE_8B = Shape("random-llama-8b", 32, 4096, 14336, 32, 8, 128, 128256)
BLOCK = 16


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


def graphs_of(engine: Engine) -> bool | None:
    """Whether the engine has decoded through CUDA graphs; None: it has none."""
    graphs = getattr(engine.runner, "graphs", None)
    return None if graphs is None else bool(graphs.num_replayed)


def decode(engine: Engine, count: int, steps: int, vocab: int) -> float:
    """Tokens/s of `count` sequences past their prompts."""
    numbers = random.Random(0)
    for request_id in range(count):
        engine.add(
            request_id, [numbers.randrange(vocab) for _ in range(8)], SamplingParams(temperature=0.0, max_tokens=4 * steps + 8)
        )
    started: set[int] = set()
    while len(started) < count:
        started |= {output.request_id for output in _outputs(engine)}
    for _ in range(3):
        engine.step()
    start, done = time.perf_counter(), 0
    for _ in range(steps):
        done += sum(1 for _ in _outputs(engine))
    seconds = time.perf_counter() - start
    for request_id in range(count):
        engine.abort(request_id)
    engine.step()
    return done / seconds


def _outputs(engine: Engine) -> Iterator[Any]:
    return (output for event in engine.step() if isinstance(event, Step) for output in event.outputs)


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
    """The 1B model with one sequence, as llama.cpp is timed; the 8B model with up to 64, and prompts."""
    if device.type == "cpu":
        _measure(device, family, row, SHAPES["tiny"], [1], [8])
        return
    _measure(device, family, row, SHAPES["llama-1b"], [1], [512])
    _measure(device, family, row, SHAPE_8B, [1, 8, 32, 64], [512, 2048])


def _measure(
    device: torch.device, family: str, row: Callable[..., None], shape: Shape, batches: list[int], prompts: list[int]
) -> None:
    small = device.type == "cpu"
    start = time.perf_counter()
    model = make(shape, device, family)
    row(made=shape.name, family=family, seconds=round(time.perf_counter() - start, 1), kernels=ops.chosen())
    limits = {"num_blocks": 64, "context_length": 128, "max_batch_tokens": 64} if small else {"num_blocks": 2048}
    plan = Plan("", device=str(device), block_size=BLOCK, kv_dtype="f32" if small else "f16", prefix_cache=False, **limits)  # type: ignore[arg-type]
    engine = Engine(model, plan, ops.chosen())
    facts = {"model": shape.name, "family": family}
    for count in batches:
        speed = decode(engine, count, 1 if small else 64, shape.vocab)
        row(batch=count, **facts, graphs=graphs_of(engine), tokens_per_second=round(speed, 1))
    for length in prompts:
        row(prompt=length, **facts, tokens_per_second=round(prefill(engine, length, shape.vocab), 1))
