"""Stage: consecutive decoder layers on one device, in one call where its kernels have that. Knows no embedding and no head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import Batch, KVCache
from ollamapy.layers.attention import Step
from ollamapy.layers.block import DecoderBlock
from ollamapy.layers.rope import RotaryTable
from ollamapy.layers.spec import Rope

Temperature = Callable[[Tensor], Tensor | None]
"""Positions (n,) -> what queries are multiplied with by their position (n,), None for models that do not."""


class Stage:
    """Layers `layers` of a model; its kernels are those in force on `device`."""

    def __init__(
        self,
        blocks: Sequence[DecoderBlock],
        layers: range,
        device: torch.device,
        rotary: Mapping[Rope, RotaryTable],
        temperature: Temperature,
    ) -> None:
        self.layers, self.device = layers, device
        self._blocks = [blocks[layer] for layer in layers]
        self._rotary, self._temperature = rotary, temperature
        ropes = list(rotary)
        ops.switch(device)
        self._stack: Any | None = ops.stack([block.fused(ropes.index(block.spec.attention.rope)) for block in self._blocks])

    def __call__(self, x: Tensor, batch: Batch, caches: Sequence[KVCache]) -> Tensor:
        """x (n, E) after the layers, n >= num_tokens; in place. `caches` are those of all layers of the model."""
        own = [caches[layer] for layer in self.layers]
        if self._stack is not None and not batch.adapters:
            length = max(batch.context_lens, default=1)
            ropes = [table.turns(length) for table in self._rotary.values()]
            self._stack(x, batch, own, ropes, self._temperature(batch.positions))
            return x
        step = self._step(batch, own)
        for block, cache in zip(self._blocks, own, strict=True):
            x = block(x, step, cache)
        return x

    def _step(self, batch: Batch, caches: Sequence[KVCache]) -> Step:
        positions = ops.pad_rows(batch.positions)
        length = max(batch.context_lens, default=1)
        rotary = {rope: table.rows(positions, length) for rope, table in self._rotary.items()}
        temperature = self._temperature(positions)
        rows = None if temperature is None else temperature.view(-1, 1, 1)
        plans = [ops.plan_attention(seen, caches[0]) for seen in batch.groups]
        return Step(plans, [seen.slot_mapping for seen in batch.groups], rotary, rows, batch.adapters)
