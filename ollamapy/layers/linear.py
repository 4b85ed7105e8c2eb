"""Linear: a matrix in whatever form its kernel wants."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ollamapy import ops
from ollamapy.engine.batch import AdapterRows
from ollamapy.layers.layer import Declared, Layer


class Linear(Layer):
    """(n, in) -> (n, out)."""

    weight: ops.Weight
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False, tied_to: str = "") -> None:
        """`tied_to` names the tensor that this layer shares with another."""
        super().__init__(
            weight=Declared((out_features, in_features), "linear", (tied_to,) if tied_to else ()),
            bias=Declared((out_features,), "dense") if bias else None,
        )

    def __call__(self, x: Tensor, adapters: Sequence[AdapterRows] = ()) -> Tensor:
        y = ops.linear(x, self.weight, self.bias)
        for adapter, scale, rows in adapters:
            adapter.add(self, x, y, scale, rows)
        return y
