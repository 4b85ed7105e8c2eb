"""Embedding: rows of the vocabulary matrix, decoded as they are asked for."""

from __future__ import annotations

from torch import Tensor

from ollamapy import ops
from ollamapy.layers.layer import Declared, Layer


class Embedding(Layer):
    """(n,) int64 -> (n, E) float32."""

    weight: ops.Weight

    def __init__(self, num_rows: int, length: int) -> None:
        super().__init__(weight=Declared((num_rows, length), "embedding"))

    def __call__(self, token_ids: Tensor) -> Tensor:
        return ops.embedding(token_ids, self.weight)
