"""Normalisation over the last dimension."""

from __future__ import annotations

from torch import Tensor

from ollamapy import ops
from ollamapy.layers.layer import Declared, Layer


def identity(x: Tensor) -> Tensor:
    """In the place of a norm that a model does not have."""
    return x


class RMSNorm(Layer):
    """The weight is the file's: converters of gemma have added the 1 already."""

    weight: Tensor

    def __init__(self, length: int, eps: float) -> None:
        super().__init__(weight=Declared((length,), "dense"))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
