"""Rows of few values: numbers and scales whose products are the dequantized weights, bit by bit."""

from __future__ import annotations

import pytest
import torch

from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.coded import coded_rows
from ollamapy.quant.dequant import INTEGERS
from ollamapy.quant.forms import CODED
from ollamapy.quant.tensor import QuantTensor
from tests.quant.test_dequant import assert_equal_bits, extreme_blocks, random_blocks


def test_every_type_of_few_values_has_a_form() -> None:
    assert set(CODED) == set(INTEGERS)


@pytest.mark.parametrize("type", CODED, ids=lambda type: type.name)
def test_products_are_the_weights(type: GGMLType) -> None:
    info, form = TYPES[type], CODED[type]
    random = random_blocks(type, 6 * 700)  # more than one slice of the encoder for blocks of 256
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
