"""Tensors in the forms that ops take."""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.gguf.types import GGMLType
from ollamapy.quant.tensor import QuantTensor


def float32(values: Tensor) -> QuantTensor:
    """Float32 values as a tensor of a file."""
    return QuantTensor.wrap(values.contiguous().view(torch.uint8).flatten(), GGMLType.F32, tuple(values.shape))
