"""Random quantized weights with scales of a useful size, for the kernels' tests."""

from __future__ import annotations

import numpy as np
import torch

from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.tensor import QuantTensor
from tests.quant.test_dequant import HALVES


def random_weight(type: GGMLType, *shape: int, seed: int = 0) -> QuantTensor:
    """Every bit pattern of codes and group scales; steps between 0.001 and 0.02, some negative."""
    info, rng = TYPES[type], np.random.default_rng([seed, type])
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // info.block_size, info.type_size), dtype=np.uint8)
    for at in HALVES.get(type, ()):
        steps = rng.uniform(0.001, 0.02, (len(blocks), 1)) * rng.choice([-1, 1], (len(blocks), 1), p=[0.2, 0.8])
        blocks[:, at : at + 2] = steps.astype("<f2").view(np.uint8)
    if type is GGMLType.MXFP4:
        blocks[:, 0] = 120 + blocks[:, 0] % 8
    if type is GGMLType.NVFP4:
        blocks[:, :4] = 32 + blocks[:, :4] % 16
    if type is GGMLType.IQ1_M:  # the step's top nibble is that of the last uint16
        blocks[:, 55] = (blocks[:, 55] & 0x8F) | 0x10
    return QuantTensor.wrap(torch.from_numpy(blocks).flatten(), type, shape)
