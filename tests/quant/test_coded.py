"""Weights of few values: numbers, scales and steps whose products are the dequantized weights, bit by bit."""

from __future__ import annotations

import pytest
import torch

from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.bits import fields
from ollamapy.quant.coded import recoded
from ollamapy.quant.dequant import INTEGERS, dequantize
from ollamapy.quant.forms import CODED, RECODED
from ollamapy.quant.tensor import QuantTensor
from tests.quant.coded_rows import coded_rows
from tests.quant.test_dequant import assert_equal_bits, extreme_blocks, random_blocks


def test_every_type_of_few_values_has_a_form() -> None:
    assert set(CODED) == set(INTEGERS)


@pytest.mark.parametrize("type", CODED, ids=lambda type: type.name)
def test_products_are_the_weights(type: GGMLType) -> None:
    info, form = TYPES[type], CODED[type]
    random = random_blocks(type, 6 * 100)
    for blocks in (random.reshape(2, 3, -1), extreme_blocks(type)[None]):
        data = torch.from_numpy(blocks)
        weight = QuantTensor(data, type, (*data.shape[:-1], data.shape[-1] // info.type_size * info.block_size))
        groups = coded_rows(weight).view(-1, form.block_bytes)
        scales = groups[:, : 4 * form.scales].contiguous().view(torch.float32)
        numbers = torch.cat((groups[:, 4 * form.scales :] & 15, groups[:, 4 * form.scales :] >> 4), 1)
        values = torch.tensor(form.values, dtype=torch.float32)[numbers.long()]
        products = values.view(len(groups), form.scales, -1) * scales.unsqueeze(-1)
        # Numbers of 0 have no sign: a -0.0 of a negative scale is the same weight.
        assert_equal_bits(products.flatten() + 0.0, weight.dequantize().flatten().numpy() + 0.0)


@pytest.mark.parametrize("type", RECODED, ids=lambda type: type.name)
def test_recoded_products_are_the_weights(type: GGMLType) -> None:
    form = RECODED[type]
    for blocks in (random_blocks(type, 700), extreme_blocks(type)):
        data = torch.from_numpy(blocks)
        held = recoded(data, type)
        assert held.shape == (len(data), form.block_bytes)
        step = held[:, : 4 if form.scales else 2].contiguous().view(torch.float32 if form.scales else torch.float16).float()
        scales = torch.ones(len(data), 1)
        if form.scales == 1:
            scales = (fields(held[:, 6:10].contiguous(), 4, 1) | fields(held[:, 4:6].contiguous(), 2, 1) << 4).float()
        elif form.scales == 2:
            scales = held[:, 4:20].float()
        low, at = 4 if form.bits == 4 else 2, form.head_bytes
        numbers = fields(held[:, at : at + 32 * low].contiguous(), low, 32)
        if form.bits == 3:
            numbers |= fields(held[:, -32:].contiguous(), 1, 32) << 2
        values = torch.tensor(form.values, dtype=torch.float32)[numbers.long()]
        products = values.view(len(data), scales.shape[1], -1) * (scales * step).unsqueeze(-1)
        assert_equal_bits(products.flatten() + 0.0, dequantize(data, type, (len(data), 256)).flatten().numpy() + 0.0)
