"""The tiles' form of types of few values in plain torch: what the kernels that pack must give, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.gguf.types import TYPES
from ollamapy.quant.coded import numbers_of
from ollamapy.quant.dequant import INTEGERS
from ollamapy.quant.forms import CODED, GROUP
from ollamapy.quant.tensor import QuantTensor


def coded_rows(weight: QuantTensor) -> Tensor:
    """(..., rows, bytes) uint8: per 32 weights their scales, then 16 bytes, byte j with the numbers of weights j and j + 16.

    The products of values and scales are the dequantized weights, bit by bit.
    """
    form, info = CODED[weight.type], TYPES[weight.type]
    values, scales = INTEGERS[weight.type](weight.data.reshape(-1, info.type_size))
    groups = info.block_size // GROUP
    codes = numbers_of(values.contiguous(), form.values).view(len(values), groups, 2, GROUP // 2)
    every = scales.repeat_interleave(groups * form.scales // scales.shape[1], 1).contiguous()
    blocks = torch.cat((every.view(torch.uint8).view(len(values), groups, -1), codes[:, :, 0] | codes[:, :, 1] << 4), 2)
    return blocks.view(*weight.shape[:-1], -1)
