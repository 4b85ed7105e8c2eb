"""Rows of few values in the kernels' forms: a number of some bits for each weight, and scales. No kernel, no tile, no plane."""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.bits import join_fields, look_up
from ollamapy.quant.dequant import CHUNK_WEIGHTS, CODEBOOKS, INTEGERS
from ollamapy.quant.forms import CODED, GROUP, RECODED
from ollamapy.quant.tensor import QuantTensor

RUN = 32  # bytes of a run of fields in a recoded block


def _numbers(values: Tensor, table: tuple[int, ...]) -> Tensor:
    """Each int8 value's place in the table, the first one: uint8 of the same shape."""
    numbers = torch.zeros(256, dtype=torch.uint8)
    for number, value in reversed(list(enumerate(table))):
        numbers[value & 255] = number
    return look_up(numbers, values.view(torch.uint8))


def coded_rows(weight: QuantTensor) -> Tensor:
    """The CPU's form, (..., rows, bytes) uint8: per 32 weights their scales, then 16 bytes, byte j with the numbers of weights
    j and j + 16.

    The products of values and scales are the dequantized weights, bit by bit.
    """
    form, info = CODED[weight.type], TYPES[weight.type]
    blocks = weight.data.reshape(-1, info.type_size)
    groups, at = info.block_size // GROUP, 4 * form.scales
    out = torch.empty(len(blocks), groups, form.block_bytes, dtype=torch.uint8)
    step = CHUNK_WEIGHTS // info.block_size
    for start in range(0, len(blocks), step):
        values, scales = INTEGERS[weight.type](blocks[start : start + step])
        part = out[start : start + step]
        codes = _numbers(values, form.values).view(len(part), groups, 2, GROUP // 2)
        torch.bitwise_or(codes[:, :, 0], codes[:, :, 1] << 4, out=part[:, :, at:])
        every = scales.repeat_interleave(groups * form.scales // scales.shape[1], 1).contiguous()
        part[:, :, :at] = every.view(torch.uint8).view(len(part), groups, at)
    return out.view(*weight.shape[:-1], -1)


def recoded(blocks: Tensor, type: GGMLType) -> Tensor:
    """The GPU's form: a file's blocks (n, type_size) -> (n, RECODED[type].block_bytes) uint8, on their device.

    A block: the step, float32; scales as IQ4_XS has its, or a byte each where there are two for 32 weights; the numbers' low
    two or four bits in runs of 32 bytes; their third bit in a run more. Value x scale x step is the dequantized weight, bit by
    bit.
    Without scales: the float16 step, then the numbers.
    """
    form = RECODED[type]
    if form.scales == 0:
        values, _ = INTEGERS[type](blocks)
        return torch.cat([blocks[:, -2:], join_fields(_numbers(values, form.values), form.bits, RUN)], 1)
    values, scales, step = CODEBOOKS[type](blocks)
    numbers = _numbers(values, form.values)
    parts = [step.contiguous().view(torch.uint8)]
    parts += [join_fields(scales >> 4, 2, 1), join_fields(scales & 15, 4, 1)] if form.scales == 1 else [scales]
    low = 4 if form.bits == 4 else 2
    parts.append(join_fields(numbers & ((1 << low) - 1), low, RUN))
    if form.bits > low:
        parts.append(join_fields(numbers >> low, 1, RUN))
    return torch.cat(parts, 1)
