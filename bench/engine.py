"""Our engine on one file: the child process of `bench.cpu`. Prints one JSON line: samples per column, sizes, load time, KL."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import figures
from bench.figures import Samples, Work
from ollamapy import ops
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import Output, Plan, SamplingParams, Step
from ollamapy.gguf.reader import GGUFFile
from ollamapy.models.decoder import Decoder
from ollamapy.models.load import load_model

BLOCK = 16
LONGEST = 1024  # tokens of one sequence


def plan(path: Path) -> Plan:
    tokens = max(LONGEST, max(figures.BATCHES) * (figures.BATCH_PROMPT + figures.BATCH_DECODE + 2 * BLOCK))
    return Plan(str(path), num_blocks=tokens // BLOCK, context_length=LONGEST, prefix_cache=False, slowdown=0.0)


class Bench:
    """One loaded model and its engine."""

    def __init__(self, path: Path, threads: int) -> None:
        self.plan = plan(path)
        start = time.perf_counter()
        with GGUFFile.open(path) as file:
            self.model: Decoder = load_model(file, torch.device("cpu"), context_length=LONGEST)
            self.sizes = sizes(file)
        self.load_seconds = time.perf_counter() - start
        ops.set_threads(threads)
        self.engine = Engine(self.model, self.plan, ops.chosen())
        self._random = random.Random(0)
        self._ids = 0

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(self.model.config.vocab_size) for _ in range(length)]

    def add(self, length: int, tokens: int) -> int:
        """A request of random tokens that will generate `tokens`, the likeliest each time."""
        self._ids += 1
        self.engine.add(self._ids, self.prompt(length), SamplingParams(temperature=0.0, max_tokens=tokens))
        return self._ids

    def outputs(self) -> list[Output]:
        """One step of the engine."""
        return [output for event in self.engine.step() if isinstance(event, Step) for output in event.outputs]

    def prefill(self, length: int) -> float:
        """Tokens/s from a prompt to its first token, in one step."""
        self.add(length, 1)
        start = time.perf_counter()
        self.engine.step()
        seconds = time.perf_counter() - start
        assert not self.engine.has_work
        return length / seconds

    def decode(self, num_seqs: int, prompt: int, steps: int) -> float:
        """Tokens/s of `num_seqs` sequences together, all past their prompts."""
        started: set[int] = set()
        ids = {self.add(prompt, steps + 1 + LONGEST // 4) for _ in range(num_seqs)}
        while started != ids:
            started |= {output.request_id for output in self.outputs()}
        start, done = time.perf_counter(), 0
        for _ in range(steps):
            done += len(self.outputs())
        seconds = time.perf_counter() - start
        assert done == num_seqs * steps
        for request_id in ids:
            self.engine.abort(request_id)
        self.engine.step()
        return done / seconds

    def measure(self, work: Work) -> Samples:
        samples: Samples = {}
        if work.prefill:
            self.prefill(figures.PROMPT)
            samples[figures.PREFILL] = [self.prefill(figures.PROMPT) for _ in range(work.repeats)]
        if work.single:
            self.decode(1, 1, 8)
            samples[work.single_column] = [self.decode(1, 1, figures.DECODE) for _ in range(work.repeats)]
        for size in work.batches:
            shape = (size, figures.BATCH_PROMPT, figures.BATCH_DECODE)
            samples[figures.batch_column(size)] = [self.decode(*shape) for _ in range(work.repeats)]
        return samples


def sizes(file: GGUFFile) -> dict[str, int]:
    """decode_bytes: of the matrices that one token reads whole (not the embedding, unless it is the head too);
    prefill_macs: multiply-adds of a prompt token in the matrices of the layers."""
    matrices = {name: info for name, info in file.tensors.items() if len(info.shape) >= 2}
    head = "output.weight" if "output.weight" in matrices else "token_embd.weight"
    layers = [info for name, info in matrices.items() if name not in ("output.weight", "token_embd.weight")]
    return {
        "decode_bytes": sum(info.nbytes for info in layers) + matrices[head].nbytes,
        "prefill_macs": sum(int(np.prod(info.shape)) for info in layers),
        "file_bytes": file.path.stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", default=",".join(map(str, figures.BATCHES)), help='"" for none')
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--no-single", action="store_true")
    parser.add_argument("--golden", default="", help="name of golden data to compare with")
    args = parser.parse_args()
    batches = tuple(int(size) for size in args.batches.split(",") if size)
    work = Work(args.threads, args.repeats, not args.no_prefill, not args.no_single, batches)
    bench = Bench(args.model, args.threads)
    found: dict[str, Any] = {**bench.sizes, "weight_bytes": bench.model.weight_bytes, "load_seconds": bench.load_seconds}
    found["kernels"] = ops.chosen()["linear"]
    found["samples"] = bench.measure(work)
    if args.golden:
        from bench.divergence import mean_kl

        found["kl"] = mean_kl(bench.model, args.golden)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
