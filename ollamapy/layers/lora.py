"""Low-rank adapters beside the matrices of a model: y += scale * B(Ax) for the rows that use them (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ollamapy import ops
from ollamapy.layers.layer import Layer


class Pair(NamedTuple):
    """One matrix's adapter: a (r, in), b (out, r); `scale` is alpha / r."""

    a: ops.Weight
    b: ops.Weight
    scale: float


class Adapter:
    """An adapter in memory: a pair for each matrix that it changes. Its kernels are those of all matrices, so that what a row
    gets does not depend on the rows beside it."""

    def __init__(self, pairs: Mapping[Layer, Pair]) -> None:
        self._pairs = pairs

    def add(self, layer: Layer, x: Tensor, y: Tensor, scale: float, rows: Tensor) -> None:
        """Adds to the `rows` (int64) of y (n, out) what the adapter makes of those of x (n, in)."""
        pair = self._pairs.get(layer)
        if pair is not None:
            inner = ops.linear(x.index_select(0, rows), pair.a).mul_(scale * pair.scale)
            y.index_add_(0, rows, ops.linear(inner, pair.b))
