"""What it costs to put a request back: to compute its context again, or to copy its KV blocks aside and back.

    python -m bench.preemption MODEL.gguf [--tokens 256 1024 2048]

Copies go through memory of this machine, block by block as a pool has them; the engine itself always computes again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from ollamapy import ops
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import Plan, SamplingParams
from ollamapy.gguf.reader import GGUFFile
from ollamapy.lifecycle.devices import physical_cores
from ollamapy.models.load import load_model

BLOCK = 16


def computed(engine: Engine, count: int, number: int) -> float:
    """Seconds to compute a context of `count` tokens that no prefix has."""
    ids = [(7 * place + 31 * number) % 500 + 5 for place in range(count)]
    engine.add(number, ids, SamplingParams(max_tokens=0))
    start = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def copied(engine: Engine, count: int, number: int) -> float:
    """Seconds to copy the blocks of `count` tokens aside, and back."""
    stride = 7  # blocks of one sequence are not neighbours
    blocks = [(number + stride * place) % engine.plan.num_blocks for place in range(-(-count // BLOCK))]
    aside = [torch.empty((len(blocks), *tensor.shape[1:]), dtype=tensor.dtype) for tensor in engine.runner.tensors]
    for place in aside:
        place.zero_()  # a pool aside is there before it is needed
    start = time.perf_counter()
    for tensor, place in zip(engine.runner.tensors, aside, strict=True):
        torch.index_select(tensor, 0, torch.tensor(blocks), out=place)
    for tensor, place in zip(engine.runner.tensors, aside, strict=True):
        tensor[blocks] = place
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    threads = physical_cores()
    torch.set_num_threads(threads)
    with GGUFFile.open(arguments.model) as file:
        model = load_model(file, torch.device("cpu"))
    ops.set_threads(threads)
    most = max(arguments.tokens)
    engine = Engine(
        model, Plan(str(arguments.model), num_blocks=4 * -(-most // BLOCK), context_length=most, prefix_cache=False)
    )
    per_token = sum(tensor[0].nbytes for tensor in engine.runner.tensors) / BLOCK
    computed(engine, most, 0)  # the pool's memory is there
    print(f"{arguments.model.name}: {per_token:.0f} bytes of KV per token, {threads} threads")
    for count in arguments.tokens:
        again = min(computed(engine, count, number) for number in range(1, arguments.rounds + 1))
        aside = min(copied(engine, count, number) for number in range(arguments.rounds))
        speed = 2 * count * per_token / aside / 1e9
        print(f"{count:6} tokens: computed again {again * 1e3:7.1f} ms, copied {aside * 1e3:6.1f} ms ({speed:.1f} GB/s)")


if __name__ == "__main__":
    main()
