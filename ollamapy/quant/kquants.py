"""Decoders of the 256-weight super-blocks with integer sub-scales: Q2_K to Q6_K, IQ4_XS, TQ1_0, TQ2_0.

Same contract as `legacy`: `blocks` (n, type_size) uint8 into `out` (n, 256) float32, bit for bit as gguf-py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.quant.bits import as_bytes, bit_planes, crumbs, half, look_up, nibbles, words
from ollamapy.quant.legacy import IQ4_PAIRS, Scaled


def _shifts(blocks: Tensor, *amounts: int) -> Tensor:
    return torch.tensor(amounts, dtype=torch.uint8, device=blocks.device)


def q2_k(blocks: Tensor, out: Tensor) -> None:
    scales = blocks[:, :16]
    factor = half(blocks, 80) * (scales & 15).float()  # (n, 16)
    offset = half(blocks, 82) * (scales >> 4).float()
    out.copy_(as_bytes(crumbs(words(blocks, 16, 80), 2), 256))
    out.view(-1, 16, 16).mul_(factor.unsqueeze(-1)).sub_(offset.unsqueeze(-1))


def q3_k(blocks: Tensor, out: Tensor) -> None:
    low = (blocks[:, 96:104].unsqueeze(1) >> _shifts(blocks, 0, 4).view(1, 2, 1)).bitwise_and_(15).view(-1, 16)
    high = (blocks[:, 104:108].unsqueeze(1) >> _shifts(blocks, 0, 2, 4, 6).view(1, 4, 1)).bitwise_and_(3).view(-1, 16)
    scales = (low | high << 4).view(torch.int8) - 32
    packed = crumbs(words(blocks, 32, 96), 2).view(-1, 8, 4)
    packed |= bit_planes(words(blocks, 0, 32)) << 2  # a set bit means "do not subtract 4"
    out.copy_(as_bytes(packed, 256).view(torch.int8).sub_(4))
    out.view(-1, 16, 16).mul_((half(blocks, 108) * scales.float()).unsqueeze(-1))


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and mins in the 12 bytes of Q4_K and Q5_K: two (n, 8) float32."""
    scale, minimum, both = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([scale & 63, (both & 15) | (scale >> 2 & 48)], dim=1)
    minima = torch.cat([minimum & 63, (both >> 4) | (minimum >> 2 & 48)], dim=1)
    return scales.float(), minima.float()


def _scale_and_shift(blocks: Tensor, out: Tensor) -> None:
    scales, minima = _scales_and_mins(blocks[:, 4:16])
    factor, offset = half(blocks, 0) * scales, half(blocks, 2) * minima
    out.view(-1, 8, 32).mul_(factor.unsqueeze(-1)).sub_(offset.unsqueeze(-1))


def q4_k(blocks: Tensor, out: Tensor) -> None:
    out.copy_(as_bytes(nibbles(words(blocks, 16, 144), 4), 256))
    _scale_and_shift(blocks, out)


def q5_k(blocks: Tensor, out: Tensor) -> None:
    packed = nibbles(words(blocks, 48, 176), 4).view(-1, 8, 4)
    packed |= bit_planes(words(blocks, 16, 48)) << 4
    out.copy_(as_bytes(packed, 256))
    _scale_and_shift(blocks, out)


def q6_k(blocks: Tensor, out: Tensor) -> None:
    packed = nibbles(words(blocks, 0, 128), 2).view(-1, 2, 4, 4)
    packed |= crumbs(words(blocks, 128, 192), 2) << 4
    out.copy_(as_bytes(packed, 256).view(torch.int8).sub_(32))
    scales = blocks[:, 192:208].view(torch.int8).float()
    out.view(-1, 16, 16).mul_((half(blocks, 208) * scales).unsqueeze(-1))


def iq4_xs(blocks: Tensor, out: Tensor) -> None:
    low = (blocks[:, 4:8].unsqueeze(-1) >> _shifts(blocks, 0, 4)).bitwise_and_(15).view(-1, 8)
    high = (blocks[:, 2:4].unsqueeze(-1) >> _shifts(blocks, 0, 2, 4, 6)).bitwise_and_(3).view(-1, 8)
    scales = (low | high << 4).view(torch.int8) - 32
    groups, packed = out.view(-1, 8, 2, 16), blocks[:, 8:136].reshape(-1, 8, 16)
    for side, table in enumerate(IQ4_PAIRS):
        groups[:, :, side] = look_up(table, packed)
    out.view(-1, 8, 32).mul_((half(blocks, 0) * scales.float()).unsqueeze(-1))


def tq1_0(blocks: Tensor) -> Scaled:
    """Five ternary digits in a byte, as a fraction of 243; 32-, 16- and 4-byte runs, then the last 4 digits each."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=blocks.device).view(1, 5, 1)
    parts = [
        (blocks[:, start:stop].unsqueeze(1) * powers[:, :digits]).flatten(1)
        for start, stop, digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    ]
    digits = (torch.cat(parts, dim=1).to(torch.int16) * 3 >> 8) - 1
    return digits.to(torch.int8), half(blocks, 52)


def tq2_0(blocks: Tensor) -> Scaled:
    return as_bytes(crumbs(words(blocks, 0, 64), 2), 256).view(torch.int8).sub_(1), half(blocks, 64)
