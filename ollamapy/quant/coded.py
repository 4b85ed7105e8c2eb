"""Weights of few values in the kernels' forms: a number of some bits for each, and scales. No kernel, no tile, no plane."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ollamapy.gguf.types import GGMLType
from ollamapy.quant.bits import join_fields, look_up
from ollamapy.quant.dequant import CODEBOOKS, INTEGERS
from ollamapy.quant.forms import CODED, RECODED
from ollamapy.quant.grids import GRIDS
from ollamapy.quant.legacy import UE4M3_SCALES

RUN = 32  # bytes of a run of fields in a recoded block


def numbers_of(values: Tensor, table: tuple[int, ...]) -> Tensor:
    """Each int8 value's place in the table, the first one: uint8 of the same shape."""
    numbers = torch.zeros(256, dtype=torch.uint8)
    for number, value in reversed(list(enumerate(table))):
        numbers[value & 255] = number
    return look_up(numbers, values.view(torch.uint8))


@cache
def cpu_table(type: GGMLType) -> Tensor | None:
    """What the CPU kernels look a type of few values up in (csrc/cpu/isa/coded.h), flat uint8; None where they count.

    Of each entry of a codebook its values' numbers, then the negatives'; of IQ1 the values a delta above, then those a delta
    below. Of NVFP4 the float32 scale that each byte stands for.
    """
    if type is GGMLType.NVFP4:
        return UE4M3_SCALES.view(torch.uint8)
    if type not in CODEBOOKS:
        return None
    if type in (GGMLType.IQ1_S, GGMLType.IQ1_M):
        eighths = GRIDS["iq1_s"] * 8
        pair = eighths + 1, eighths - 1
    else:
        pair = GRIDS[type.name.lower()], -GRIDS[type.name.lower()]
    return numbers_of(torch.stack(pair, 1), CODED[type].values).flatten()


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
        return torch.cat([blocks[:, -2:], join_fields(numbers_of(values, form.values), form.bits, RUN)], 1)
    values, scales, step = CODEBOOKS[type](blocks)
    numbers = numbers_of(values, form.values)
    parts = [step.contiguous().view(torch.uint8)]
    parts += [join_fields(scales >> 4, 2, 1), join_fields(scales & 15, 4, 1)] if form.scales == 1 else [scales]
    low = 4 if form.bits == 4 else 2
    parts.append(join_fields(numbers & ((1 << low) - 1), low, RUN))
    if form.bits > low:
        parts.append(join_fields(numbers >> low, 1, RUN))
    return torch.cat(parts, 1)
