"""Every op against ollamapy.quant, bit for bit, under the instruction set in force. Also a program, for OLLAMAPY_CPU_ISA."""

from __future__ import annotations

import re

import numpy as np
import torch

from ollamapy import extension
from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.dequant import dequantize
from ollamapy.quant.tensor import QuantTensor
from tests.quant.test_dequant import extreme_blocks, make_finite, random_blocks

NAMES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"
KNOWN = [GGMLType[name] for name in re.findall(r"\w+", NAMES)]


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    )


def check_blocks(ops: object, type: GGMLType) -> None:
    """Every extreme and random block as a row of its own."""
    blocks = np.concatenate([extreme_blocks(type), random_blocks(type, 300)])
    data = torch.from_numpy(np.ascontiguousarray(blocks))
    expected = dequantize(data, type, (len(blocks), TYPES[type].block_size))
    found = ops.embedding_rows(data, int(type), torch.arange(len(blocks)))
    assert same_bits(found, expected), type.name


def check_gathers(ops: object, type: GGMLType) -> None:
    """Rows of several blocks, repeated and unordered ids of both widths, row slices, none at all, and enough for threads."""
    width = 3 * TYPES[type].block_size
    bytes_per_row = 3 * TYPES[type].type_size
    data = make_finite(type, random_blocks(type, 3 * 53)).reshape(53, bytes_per_row)
    weight = QuantTensor(torch.from_numpy(data), type, (53, width))
    generator = torch.Generator().manual_seed(int(type))
    for count in (0, 1, 2, 7, 1000):
        ids = torch.randint(0, 53, (count,), generator=generator)
        expected = weight.dequantize()[ids]
        for form in (ids, ids.int(), torch.stack([ids, ids], 1)[:, 0]):
            assert same_bits(ops.embedding_rows(weight.data, int(type), form), expected), (type.name, count)
    part = weight.rows(5, 40)
    assert same_bits(ops.embedding_rows(part.data, int(type), torch.tensor([34, 0])), part.dequantize()[[34, 0]])
    padded = torch.zeros(53, bytes_per_row + 64, dtype=torch.uint8)
    padded[:, :bytes_per_row] = weight.data
    view = padded[:, :bytes_per_row]
    assert same_bits(ops.embedding_rows(view, int(type), torch.tensor([52, 1])), weight.dequantize()[[52, 1]])


def check_all() -> None:
    ops = extension.load()
    for type in KNOWN:
        check_blocks(ops, type)
        check_gathers(ops, type)


if __name__ == "__main__":
    check_all()
    print(extension.isa(), len(KNOWN), extension.status(), sep="|")
