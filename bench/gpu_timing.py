"""Times of calls on a GPU: inside a CUDA graph, over copies of the weights that do not fit its L2 cache together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import ollamapy.triton_kernels as triton_kernels
from bench.make_model import SCALES
from ollamapy.engine.batch import Batch, LayerState
from ollamapy.gguf.types import TYPES, GGMLType, row_nbytes
from ollamapy.quant.tensor import QuantTensor
from ollamapy.triton_kernels.layout import Planes, pack

COLD = 300 << 20  # bytes that no L2 cache holds
REPEATS = 5


@triton.jit
def _read_kernel(source, out, count, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.sum(tl.load(source + at, at < count, other=0), 0)
    if total == 123456789:  # never, and nobody but the compiler believes it may be
        tl.store(out, total)


def probe(device: torch.device, size: int) -> float:
    """GB/s of a kernel that does nothing but read `size` bytes: what a matvec can hope for."""
    source, out = torch.ones(size // 4, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    block = 8192
    seconds = over([source], lambda s: _read_kernel[(triton.cdiv(s.numel(), block),)](s, out, s.numel(), SIZE=block), device)
    return size / seconds / 1e9


def random_weight(type: GGMLType, rows: int, columns: int, device: torch.device) -> QuantTensor:
    """Random bits under steps of a useful size."""
    data = torch.randint(0, 256, (rows, row_nbytes(type, columns)), dtype=torch.uint8, device=device)
    blocks = data.view(-1, TYPES[type].type_size)
    for scale in SCALES.get(type, ()):
        step = torch.tensor([scale.size], dtype=torch.float16, device=device).view(torch.uint8)
        blocks[:, scale.offset : scale.offset + 2] = step
    return QuantTensor(data, type, (rows, columns))


def copies(type: GGMLType, rows: int, columns: int, device: torch.device) -> list[Planes]:
    """A matrix as often as it takes to pass an L2 cache by."""
    first = pack(random_weight(type, rows, columns, device))
    count = 1 if device.type == "cpu" else min(max(COLD // first.nbytes, 1) + 1, 32)
    parts = ("low", "high", "scales", "d", "m")
    made = [first]
    for _ in range(count - 1):
        planes = {name: None if (plane := getattr(first, name)) is None else plane.clone() for name in parts}
        made.append(Planes(first.type, first.shape, **planes))  # type: ignore[arg-type]
    return made


def over(items: Sequence[Any], call: Callable[[Any], Any], device: torch.device) -> float:
    """Seconds of one call: the median over repeats of all items, each time one graph of at least 20 calls."""
    rounds = max(20 // len(items), 1)

    def everything() -> None:
        for _ in range(rounds):
            for item in items:
                call(item)

    if device.type == "cpu":
        start = time.perf_counter()
        call(items[0])
        return time.perf_counter() - start
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for item in items[:2]:
            call(item)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            everything()
        times = []
        for _ in range(REPEATS + 1):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / (rounds * len(items)))
    return statistics.median(times[1:])


def triton_project() -> Callable[..., Tensor]:
    return triton_kernels.load("project", {"project": "linear.project"})


def attention(device: torch.device, row: Callable[..., None], context: int, count: int, small: bool) -> None:
    """Decode of `count` sequences, 32 heads of 128 on 8: microseconds and GB/s of keys and values."""
    heads, kv_heads, length, block = (2, 1, 32, 16) if small else (32, 8, 128, 16)
    new_cache, plan_of, attend = (triton_kernels.load(op) for op in ("new_cache", "plan_attention", "attention"))
    blocks = -(-context // block)
    cache = new_cache(
        LayerState(kv_heads, length, length), count * blocks, block, torch.float32 if small else torch.float16, device
    )
    ids = torch.arange(count, device=device)
    batch = Batch(
        token_ids=ids,
        positions=torch.full_like(ids, context - 1),
        slot_mapping=ids * blocks * block + context - 1,
        block_table=torch.arange(count * blocks, dtype=torch.int32, device=device).view(count, -1),
        query_start=torch.arange(count + 1, dtype=torch.int32, device=device),
        seq_lens=torch.full((count,), context, dtype=torch.int32, device=device),
        logit_rows=ids,
        query_lens=[1] * count,
        context_lens=[context] * count,
    )
    q = torch.randn(count, heads, length, device=device, dtype=cache.key.dtype)
    plan = plan_of(batch, cache)
    seconds = over([q], lambda x: attend(x, cache, plan, scale=length**-0.5), device)
    gbs = (cache.key.nbytes + cache.value.nbytes) / seconds / 1e9
    row(attention=context, batch=count, us=round(seconds * 1e6, 1), gbs=round(gbs, 1))


def packing(device: torch.device, row: Callable[..., None], small: bool) -> None:
    """From a file's bytes in host memory to planes: copy and repack."""
    shape = (64, 256) if small else (14336, 4096)
    weight = random_weight(GGMLType.Q4_K, *shape, torch.device("cpu"))
    for _ in range(2):  # the second time without what comes first
        start = time.perf_counter()
        planes = pack(weight.to(device))
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    row(packing="Q4_K", mb=round(planes.nbytes / 1e6, 1), gbs=round(planes.nbytes / seconds / 1e9, 2))
