"""Weights and activations for the kernels' checks; and their products: int8 rows times decoded weights, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.gguf.types import GGMLType
from ollamapy.quant.tensor import QuantTensor
from tests.triton.data import random_weight as random_weight

UNIT = 2.0**-24  # relative rounding of a float32
K_QUANTS = frozenset(type for type in GGMLType if type.name.endswith("_K")) | {GGMLType.IQ4_XS}


def activations(rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) float32: groups of different size, one of zeros, one too small to be scaled, values at a tie."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    groups = x.view(rows, -1, 32)
    groups.mul_(torch.rand(*groups.shape[:2], 1, generator=generator).mul_(8).sub_(4).exp_())
    groups[0, 0] = 0.0
    if groups.shape[1] > 2:
        groups[0, 1] *= 1e-38 / groups[0, 1].abs().max()
        groups[0, 2, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])
        groups[0, 2, 4:].clamp_(-3, 3)
    return x


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, K) -> codes (n, K / 32, 32) and scales (n, K / 32), float32: round(x * 127 / max|x|) of each group.

    A tensor of 127 and no number: torch would multiply by the reciprocal, which rounds twice.
    """
    groups = x.float().reshape(x.shape[0], -1, 32)
    top = groups.abs().amax(-1, keepdim=True)
    some = (top > 4e-37) & top.isfinite()
    codes = torch.where(some, (groups * (torch.tensor(127.0) / top)).round(), 0.0)
    scale = torch.where(some, top / 127.0, torch.where(top.isfinite(), 0.0, torch.nan))
    return codes, scale.squeeze(-1)


def expected(x: Tensor, weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """int8 rows of x times W^T in float64, (n, N), and a bound of the error of adding that up in float32.

    A group adds f * dot - g * sum, f and g being its scale and min: at most 3 max|w| sum|x| in magnitude, as a weight of code
    0 is -g. Eight partial sums of pairs of groups: four roundings a pair, as many of the products', and three to join them.
    """
    codes, scale = int8_rows(x)
    rows = (codes.double() * scale.double().unsqueeze(-1)).flatten(1)
    dense = weight.dequantize().double()
    largest = 3 * rows.abs().sum(1, keepdim=True) * dense.abs().amax(1)
    pairs = -(-x.shape[1] // 64)
    return rows @ dense.t(), largest * (8 * -(-pairs // 8) + 4) * UNIT
