"""Decoders of the formats whose groups of weights are entries of a codebook: IQ1_S, IQ1_M, IQ2_*, IQ3_*.

`blocks` (n, type_size) uint8 -> values (n, 256) int8, the whole scales (n, S) of equal runs of them, uint8 up to 31, and the
float32 step (n, 1) of these; a weight is value x scale x step, bit for bit as gguf-py: in every order products are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.quant.bits import half, look_up
from ollamapy.quant.grids import GRIDS

Stepped = tuple[Tensor, Tensor, Tensor]

IQ1_DELTA = 0.125  # added to a grid's value or taken from it: values are eighths

_SIGNS = torch.tensor([[-1 if byte >> bit & 1 else 1 for bit in range(8)] for byte in range(256)], dtype=torch.int8)
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


def _signed(grid: Tensor, signs: Tensor) -> Tensor:
    return (grid.view(-1, 8) * signs.view(-1, 8)).view(-1, 256)


def _odd(numbers: Tensor) -> Tensor:
    """2 s + 1."""
    return (numbers * 2 + 1).to(torch.uint8)


def iq2_xxs(blocks: Tensor) -> Stepped:
    pairs = _longs(blocks, 2, 66).view(-1, 8, 2)
    grid = look_up(GRIDS["iq2_xxs"], _fields(pairs[..., 0], 8, 0, 8, 16, 24))
    signs = look_up(_EVEN_SIGNS, _fields(pairs[..., 1], 7, 0, 7, 14, 21))
    return _signed(grid, signs), _odd(pairs[..., 1] >> 28), half(blocks, 0) * 0.125


def iq2_xs(blocks: Tensor) -> Stepped:
    codes = _shorts(blocks, 2, 66)
    values = _signed(look_up(GRIDS["iq2_xs"], codes & 511), look_up(_EVEN_SIGNS, codes >> 9))
    return values, _odd(_fields(blocks[:, 66:74], 4, 0, 4)), half(blocks, 0) * 0.125


def iq2_s(blocks: Tensor) -> Stepped:
    codes = blocks[:, 2:34].int() | _fields(blocks[:, 66:74], 2, 0, 2, 4, 6).int() << 8
    values = _signed(look_up(GRIDS["iq2_s"], codes), look_up(_SIGNS, blocks[:, 34:66]))
    return values, _odd(_fields(blocks[:, 74:82], 4, 0, 4)), half(blocks, 0) * 0.125


def iq3_xxs(blocks: Tensor) -> Stepped:
    packed = _longs(blocks, 66, 98)
    signs = look_up(_EVEN_SIGNS, _fields(packed, 7, 0, 7, 14, 21))
    return _signed(look_up(GRIDS["iq3_xxs"], blocks[:, 2:66]), signs), _odd(packed >> 28), half(blocks, 0) * 0.25


def iq3_s(blocks: Tensor) -> Stepped:
    codes = blocks[:, 2:66].int() | _fields(blocks[:, 66:74], 1, *range(8)).int() << 8
    values = _signed(look_up(GRIDS["iq3_s"], codes), look_up(_SIGNS, blocks[:, 74:106]))
    return values, _odd(_fields(blocks[:, 106:110], 4, 0, 4)), half(blocks, 0)


def _shifted(grid: Tensor, negative: Tensor) -> Tensor:
    """8 x (grid +- delta); negative (n, D) bool, each for its run of weights."""
    runs = (grid * 8).view(grid.shape[0], negative.shape[1], -1)
    return runs.add_((1 - 2 * negative.to(torch.int8)).unsqueeze(-1)).view(-1, 256)


def iq1_s(blocks: Tensor) -> Stepped:
    high = _shorts(blocks, 34, 50)  # (n, 8): four 3-bit code tops, 3-bit scale, sign of delta
    codes = blocks[:, 2:34].int() | _fields(high, 3, 0, 3, 6, 9) << 8
    values = _shifted(look_up(GRIDS["iq1_s"], codes), high >= 0x8000)
    return values, _odd(high >> 12 & 7), half(blocks, 0) * IQ1_DELTA


def iq1_m(blocks: Tensor) -> Stepped:
    scales = _shorts(blocks, 48, 56)  # (n, 4): the float16 scale hides in the four top nibbles
    tops = scales >> 12
    bits = tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12
    step = bits.to(torch.int16).view(torch.float16).float().unsqueeze(-1) * IQ1_DELTA
    high = _fields(blocks[:, 32:48], 4, 0, 4).int()
    codes = blocks[:, :32].int() | (high & 7) << 8
    return _shifted(look_up(GRIDS["iq1_s"], codes), high >= 8), _odd(_fields(scales, 3, 0, 3, 6, 9)), step
