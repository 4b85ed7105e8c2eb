"""Rows of few values in the CPU kernels' form: a number of 4 bits for each weight, and float32 scales. No kernel, no tile."""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.gguf.types import TYPES
from ollamapy.quant.dequant import CHUNK_WEIGHTS, INTEGERS
from ollamapy.quant.forms import CODED, GROUP
from ollamapy.quant.tensor import QuantTensor


def coded_rows(weight: QuantTensor) -> Tensor:
    """(..., rows, bytes) uint8: per 32 weights their scales, then 16 bytes, byte j with the numbers of weights j and j + 16.

    The products of values and scales are the dequantized weights, bit by bit.
    """
    form, info = CODED[weight.type], TYPES[weight.type]
    numbers = torch.zeros(256, dtype=torch.uint8)
    for number, value in reversed(list(enumerate(form.values))):
        numbers[value & 255] = number
    blocks = weight.data.reshape(-1, info.type_size)
    groups, at = info.block_size // GROUP, 4 * form.scales
    out = torch.empty(len(blocks), groups, form.block_bytes, dtype=torch.uint8)
    step = CHUNK_WEIGHTS // info.block_size
    for start in range(0, len(blocks), step):
        values, scales = INTEGERS[weight.type](blocks[start : start + step])
        part = out[start : start + step]
        codes = torch.index_select(numbers, 0, values.view(torch.uint8).flatten().int()).view(len(part), groups, 2, GROUP // 2)
        torch.bitwise_or(codes[:, :, 0], codes[:, :, 1] << 4, out=part[:, :, at:])
        every = scales.repeat_interleave(groups * form.scales // scales.shape[1], 1).contiguous()
        part[:, :, :at] = every.view(torch.uint8).view(len(part), groups, at)
    return out.view(*weight.shape[:-1], -1)
