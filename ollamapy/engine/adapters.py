"""Adapters of requests: loaded when the first one names them, kept for a while, applied to their own rows. No file format.

Sequences with adapters go through the model's layers apart from the others, one layer at a time: the others keep the pass that
runs all layers in one call, and with it their bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ollamapy.engine.batch import AdapterRows, RowAdapter
from ollamapy.engine.build import build_batch, num_wanted
from ollamapy.engine.protocol import MAX_ADAPTERS
from ollamapy.engine.runner import ModelRunner
from ollamapy.engine.schedule import Schedule
from ollamapy.engine.transfer import sent
from ollamapy.errors import NotSupported


class Adapters:
    """By the path of their file. `load` runs in a thread, so that the steps of others go on."""

    def __init__(self, load: Callable[[str], RowAdapter] | None) -> None:
        self._load = load
        self._loaded: OrderedDict[str, Future[RowAdapter]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def start(self, path: str) -> Future[RowAdapter]:
        """The future raises what loading raises: an OllamapyError where the file does not fit. What failed is tried again."""
        found = self._loaded.pop(path, None)
        if found is None or (found.done() and found.exception() is not None):
            found = self._begin(path)
        self._loaded[path] = found
        if len(self._loaded) > MAX_ADAPTERS:
            self._loaded.popitem(last=False)
        return found

    def _begin(self, path: str) -> Future[RowAdapter]:
        if self._load is None:
            refused: Future[RowAdapter] = Future()
            refused.set_exception(NotSupported("this model takes no adapters"))
            return refused
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "adapter")
        return self._thread.submit(self._load, path)


def forward(runner: ModelRunner, step: Schedule, block_size: int) -> Tensor:
    """Hidden states of the rows that are wanted, in the step's order: (num_wanted, E) float32."""
    adapted = [index for index, seq in enumerate(step.sequences) if seq.adapters]
    if not adapted:
        return runner.forward(build_batch(step, block_size, runner.device))
    plain = [index for index, seq in enumerate(step.sequences) if not seq.adapters]
    states, order = [], []
    for indices in (plain, adapted):
        if not indices:
            continue
        part = Schedule([step.sequences[index] for index in indices], [step.num_tokens[index] for index in indices])
        batch = build_batch(part, block_size, runner.device)
        batch.adapters = adapter_rows(part, runner.device)
        states.append(runner.forward(batch))
        order += [index for index in indices for _ in range(num_wanted(step.sequences[index], step.num_tokens[index]))]
    places = sorted(range(len(order)), key=order.__getitem__)  # stable: the rows of a sequence stay in their order
    return torch.cat(states)[places]


def adapter_rows(step: Schedule, device: torch.device) -> tuple[AdapterRows, ...]:
    """The rows of each adapter and scale in the step's batch. A row's adapters come in the order of its request's."""
    rows: dict[tuple[int, int, float], tuple[RowAdapter, list[int]]] = {}
    start = 0
    for seq, length in zip(step.sequences, step.num_tokens, strict=True):
        for place, (adapter, scale) in enumerate(seq.adapters):
            rows.setdefault((place, id(adapter), scale), (adapter, []))[1].extend(range(start, start + length))
        start += length
    return tuple(
        AdapterRows(adapter, scale, sent(torch.tensor(own), device))
        for (_, _, scale), (adapter, own) in sorted(rows.items(), key=lambda item: item[0][0])
    )
