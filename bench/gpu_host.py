"""What a decoding step costs the host on a GPU's path, without a GPU: everything that the device would do is left out.

`python -m bench.gpu_host` prints microseconds a step by batch: of the engine with recorded steps that overlap, and of what it
does beside them. This is what a device has to work longer than, or it waits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ollamapy.engine.batch import Batch, KVCache, Move
from ollamapy.engine.engine import Engine
from ollamapy.engine.protocol import LayerGroup, Plan, SamplingParams
from tests.engine.device import Emulated

VOCAB = 1024  # so few that drawing is launches alone
STEPS = 300


class Nothing:
    """A model that computes nothing."""

    weight_bytes = vram_bytes = 0
    config = SimpleNamespace(architecture="none", embedding_length=8, vocab_size=VOCAB, causal=True, pooling_type="")

    def __init__(self) -> None:
        self._logits = torch.randn(256, VOCAB)

    def new_caches(
        self, num_blocks: int, block_size: int, dtype: torch.dtype, groups: Sequence[LayerGroup] = ()
    ) -> list[KVCache]:
        return [KVCache(torch.zeros(num_blocks, 1), torch.zeros(num_blocks, 1))]

    def forward(self, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        return torch.zeros(len(batch.logit_rows), 8)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits[: hidden.shape[0]]


class Device(Emulated):
    """Recorded steps are not done again: that is one call."""

    def record(self, run: Callable[[Move], None]) -> Any:
        run(Tensor.to)
        return SimpleNamespace(replay=lambda: None)


def measure(count: int, overlap: bool, params: dict[str, Any]) -> float:
    """Median microseconds of a step."""
    plan = Plan("", num_blocks=8192, block_size=16, context_length=4096, max_batch_tokens=4096, kv_dtype="f32", overlap=overlap)
    engine = Engine(Nothing(), plan, {}, accelerator=Device())
    for request in range(count):
        engine.add(request, [1 + request % 7] * 200, SamplingParams(max_tokens=1000, speculation="off", seed=request, **params))
    for _ in range(20):
        engine.step()
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    kinds: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "Ollama's defaults": {"repeat_penalty": 1.0}}
    for name, params in kinds.items():
        for overlap in (True, False):
            found = "  ".join(f"{count}: {measure(count, overlap, params):.0f}" for count in (1, 8, 32, 64))
            print(f"{name}, {'overlapping' if overlap else 'one after the other'}: {found} us a step")


if __name__ == "__main__":
    main()
