"""Unpacking shared by the block decoders: eight bytes at a time as one int64, without Python loops over blocks.

Blocks are uint8 tensors (n, type_size) of which each row is one block; all formats are little endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

BYTES_01 = 0x0101010101010101
BYTES_03 = 0x0303030303030303
BYTES_0F = 0x0F0F0F0F0F0F0F0F
BYTES_10 = 0x1010101010101010
BYTES_7F = 0x7F7F7F7F7F7F7F7F
_BIT_OF_BYTE = 0x8040201008040201 - (1 << 64)  # byte i keeps bit i


def half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: (n, 1) float32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def words(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes `start` to `stop` of each block as int64: (n, (stop - start) / 8)."""
    packed = torch.empty(blocks.shape[0], stop - start, dtype=torch.uint8, device=blocks.device)
    return packed.copy_(blocks[:, start:stop]).view(torch.int64)


def nibbles(packed: Tensor, groups: int) -> Tensor:
    """Low nibbles, then high nibbles, of each of `groups` equal runs of words: (n, W) -> (n, groups, 2, W / groups)."""
    runs = packed.view(packed.shape[0], groups, -1)
    out = torch.empty(packed.shape[0], groups, 2, runs.shape[-1], dtype=torch.int64, device=packed.device)
    torch.bitwise_and(runs, BYTES_0F, out=out[:, :, 0])
    torch.bitwise_and(runs >> 4, BYTES_0F, out=out[:, :, 1])
    return out


def crumbs(packed: Tensor, groups: int) -> Tensor:
    """The four 2-bit fields, lowest first, of each run of words: (n, W) -> (n, groups, 4, W / groups)."""
    runs = packed.view(packed.shape[0], groups, 1, -1)
    shifts = torch.tensor([0, 2, 4, 6], device=packed.device).view(1, 1, 4, 1)
    return (runs >> shifts).bitwise_and_(BYTES_03)


def bit_planes(packed: Tensor) -> Tensor:
    """Bits 0 to 7 of every byte, a plane each, as bytes 0 or 1: (n, W) -> (n, 8, W)."""
    shifts = torch.arange(8, device=packed.device).view(1, 8, 1)
    return (packed.unsqueeze(1) >> shifts).bitwise_and_(BYTES_01)


def spread_bits(bits: Tensor, value: int) -> Tensor:
    """Each byte's eight bits become eight bytes, `value` (a power of two below 128) where set: (n, B) -> (n, B) int64."""
    spread = (bits.long() * BYTES_01).bitwise_and_(_BIT_OF_BYTE)
    spread += BYTES_7F  # the top bit of a byte is now set where the byte was not zero; no carry between bytes
    return (spread >> (8 - value.bit_length())).bitwise_and_(BYTES_01 * value)


def as_bytes(packed: Tensor, width: int) -> Tensor:
    """Words as uint8 with `width` columns."""
    return packed.view(packed.shape[0], -1).view(torch.uint8).view(-1, width)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]` with the table on the index's device; index of any integer type and shape."""
    rows = torch.index_select(table.to(index.device), 0, index.reshape(-1).int())
    return rows.view(*index.shape, *table.shape[1:])


def fields(data: Tensor, bits: int, width: int) -> Tensor:
    """(n, runs of `width` bytes) -> (n, codes of `bits` bits) one byte each: a run's lowest bits first."""
    if bits == 8:
        return data
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    runs = data.view(data.shape[0], -1, 1, width)
    return (runs >> shifts).bitwise_and_((1 << bits) - 1).view(data.shape[0], -1)


def join_fields(codes: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `fields`."""
    if bits == 8:
        return codes
    parts = codes.view(codes.shape[0], -1, 8 // bits, width)
    packed = parts[:, :, 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[:, :, place] << (place * bits)
    return packed.view(codes.shape[0], -1)
