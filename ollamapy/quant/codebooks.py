"""Decoders of the formats whose groups of weights are entries of a codebook: IQ1_S, IQ1_M, IQ2_*, IQ3_*.

Same contract as `legacy`: `blocks` (n, type_size) uint8 into `out` (n, 256) float32, bit for bit as gguf-py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.quant.bits import half, look_up
from ollamapy.quant.grids import GRIDS

IQ1_DELTA = 0.125

_SIGNS = torch.tensor([[-1.0 if byte >> bit & 1 else 1.0 for bit in range(8)] for byte in range(256)])
_EVEN_SIGNS = torch.stack([_SIGNS[index | (index.bit_count() & 1) << 7] for index in range(128)])  # 7 bits and parity


def _fields(packed: Tensor, width: int, *shifts: int) -> Tensor:
    """Fields of `width` bits at each shift: (n, W) -> (n, W * len(shifts))."""
    amounts = torch.tensor(shifts, dtype=packed.dtype, device=packed.device)
    return ((packed.unsqueeze(-1) >> amounts) & ((1 << width) - 1)).flatten(1)


def _shorts(blocks: Tensor, start: int, stop: int) -> Tensor:
    """uint16 values, as int32."""
    return blocks[:, start:stop].view(torch.int16).int() & 0xFFFF


def _longs(blocks: Tensor, start: int, stop: int) -> Tensor:
    """uint32 values, as int64. Built from 16-bit parts: super-blocks are aligned to 2 bytes only."""
    parts = _shorts(blocks, start, stop).long()
    return parts[:, 0::2] | parts[:, 1::2] << 16


def _combine(out: Tensor, scale: Tensor, grid: Tensor, signs: Tensor) -> None:
    """scale (n, S) x grid (n, ...) x signs (n, ...), each group of 256 / S weights with its scale."""
    groups = out.view(-1, scale.shape[1], 256 // scale.shape[1])
    groups.copy_(grid.view_as(groups)).mul_(scale.unsqueeze(-1)).mul_(signs.view_as(groups))


def iq2_xxs(blocks: Tensor, out: Tensor) -> None:
    pairs = _longs(blocks, 2, 66).view(-1, 8, 2)
    scale = half(blocks, 0) * ((pairs[..., 1] >> 28).float() + 0.5) * 0.25
    grid = look_up(GRIDS["iq2_xxs"], _fields(pairs[..., 0], 8, 0, 8, 16, 24))
    _combine(out, scale, grid, look_up(_EVEN_SIGNS, _fields(pairs[..., 1], 7, 0, 7, 14, 21)))


def iq2_xs(blocks: Tensor, out: Tensor) -> None:
    codes = _shorts(blocks, 2, 66)
    scale = half(blocks, 0) * (_fields(blocks[:, 66:74], 4, 0, 4).float() + 0.5) * 0.25
    _combine(out, scale, look_up(GRIDS["iq2_xs"], codes & 511), look_up(_EVEN_SIGNS, codes >> 9))


def iq2_s(blocks: Tensor, out: Tensor) -> None:
    codes = blocks[:, 2:34].int() | _fields(blocks[:, 66:74], 2, 0, 2, 4, 6).int() << 8
    scale = half(blocks, 0) * (_fields(blocks[:, 74:82], 4, 0, 4).float() + 0.5) * 0.25
    _combine(out, scale, look_up(GRIDS["iq2_s"], codes), look_up(_SIGNS, blocks[:, 34:66]))


def iq3_xxs(blocks: Tensor, out: Tensor) -> None:
    packed = _longs(blocks, 66, 98)
    scale = half(blocks, 0) * ((packed >> 28).float() + 0.5) * 0.5
    signs = look_up(_EVEN_SIGNS, _fields(packed, 7, 0, 7, 14, 21))
    _combine(out, scale, look_up(GRIDS["iq3_xxs"], blocks[:, 2:66]), signs)


def iq3_s(blocks: Tensor, out: Tensor) -> None:
    codes = blocks[:, 2:66].int() | _fields(blocks[:, 66:74], 1, *range(8)).int() << 8
    scale = half(blocks, 0) * (_fields(blocks[:, 106:110], 4, 0, 4).float() * 2 + 1)
    _combine(out, scale, look_up(GRIDS["iq3_s"], codes), look_up(_SIGNS, blocks[:, 74:106]))


def _shifted(out: Tensor, scale: Tensor, grid: Tensor, negative: Tensor) -> None:
    """scale x (grid +- delta): scale (n, S), negative (n, D) bool, each for its run of weights."""
    runs = out.view(-1, negative.shape[1], 256 // negative.shape[1])
    runs.copy_(grid.view_as(runs)).add_((negative.float() * -2 + 1).mul_(IQ1_DELTA).unsqueeze(-1))
    out.view(-1, scale.shape[1], 256 // scale.shape[1]).mul_(scale.unsqueeze(-1))


def iq1_s(blocks: Tensor, out: Tensor) -> None:
    high = _shorts(blocks, 34, 50)  # (n, 8): four 3-bit code tops, 3-bit scale, sign of delta
    codes = blocks[:, 2:34].int() | _fields(high, 3, 0, 3, 6, 9) << 8
    scale = half(blocks, 0) * ((high >> 12 & 7).float() * 2 + 1)
    _shifted(out, scale, look_up(GRIDS["iq1_s"], codes), high >= 0x8000)


def iq1_m(blocks: Tensor, out: Tensor) -> None:
    scales = _shorts(blocks, 48, 56)  # (n, 4): the float16 scale hides in the four top nibbles
    tops = scales >> 12
    bits = tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12
    factor = bits.to(torch.int16).view(torch.float16).float().unsqueeze(-1)
    high = _fields(blocks[:, 32:48], 4, 0, 4).int()
    codes = blocks[:, :32].int() | (high & 7) << 8
    scale = factor * (_fields(scales, 3, 0, 3, 6, 9).float() * 2 + 1)
    _shifted(out, scale, look_up(GRIDS["iq1_s"], codes), high >= 8)
