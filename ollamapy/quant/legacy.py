"""Decoders of the formats with one small block and one scale: Q4_0 to Q8_0, IQ4_NL, MXFP4, NVFP4, Q1_0, Q2_0.

A decoder fills `out` (n, block_size) float32 from `blocks` (n, type_size) uint8. The order of the float operations is
that of gguf-py and ggml, so results are equal to theirs bit for bit. Layouts: ggml's `ggml-common.h`. NVFP4, Q1_0 and Q2_0 tell
values and scales apart, as `codebooks` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ollamapy.quant.bits import as_bytes, half, look_up, nibbles, spread_bits, words

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1, doubled


Scaled = tuple[Tensor, Tensor]


def _pairs(values: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Tables from a whole byte to the value of its low and of its high nibble."""
    low = torch.tensor([values[byte & 15] for byte in range(256)], dtype=torch.float32)
    high = torch.tensor([values[byte >> 4] for byte in range(256)], dtype=torch.float32)
    return low, high


IQ4_PAIRS = _pairs(IQ4_VALUES)
FP4_PAIRS = _pairs(FP4_VALUES)
FP4_PAIRS_8 = torch.stack(FP4_PAIRS, 1).to(torch.int8)  # (256, 2)


def _e8m0_halved(byte: int) -> float:
    return 2.0 ** (byte - 128)  # byte 0 is 2^-128: subnormal in float32


def _ue4m3_halved(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte in (0, 0x7F):  # 0x7F is NaN in the format; read as zero, as ggml does
        return 0.0
    return mantissa * 2.0**-10 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 8)


E8M0_SCALES = torch.tensor([_e8m0_halved(byte) for byte in range(256)], dtype=torch.float32)
UE4M3_SCALES = torch.tensor([_ue4m3_halved(byte) for byte in range(256)], dtype=torch.float32)


def q4_0(blocks: Tensor, out: Tensor) -> None:
    values = as_bytes(nibbles(words(blocks, 2, 18), 1), 32).view(torch.int8)
    out.copy_(values.sub_(8)).mul_(half(blocks, 0))


def q4_1(blocks: Tensor, out: Tensor) -> None:
    values = as_bytes(nibbles(words(blocks, 4, 20), 1), 32)
    out.copy_(values).mul_(half(blocks, 0)).add_(half(blocks, 2))


def q5_0(blocks: Tensor, out: Tensor) -> None:
    packed = nibbles(words(blocks, 6, 22), 1).view(-1, 4)
    packed |= spread_bits(blocks[:, 2:6], 16)
    out.copy_(as_bytes(packed, 32).view(torch.int8).sub_(16)).mul_(half(blocks, 0))


def q5_1(blocks: Tensor, out: Tensor) -> None:
    packed = nibbles(words(blocks, 8, 24), 1).view(-1, 4)
    packed |= spread_bits(blocks[:, 4:8], 16)
    out.copy_(as_bytes(packed, 32)).mul_(half(blocks, 0)).add_(half(blocks, 2))


def q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(as_bytes(words(blocks, 2, 34), 32).view(torch.int8)).mul_(half(blocks, 0))


def iq4_nl(blocks: Tensor, out: Tensor) -> None:
    for side, table in enumerate(IQ4_PAIRS):
        out[:, 16 * side : 16 * side + 16] = look_up(table, blocks[:, 2:18])
    out.mul_(half(blocks, 0))


def mxfp4(blocks: Tensor, out: Tensor) -> None:
    for side, table in enumerate(FP4_PAIRS):
        out[:, 16 * side : 16 * side + 16] = look_up(table, blocks[:, 1:17])
    out.mul_(look_up(E8M0_SCALES, blocks[:, :1]))


def nvfp4(blocks: Tensor) -> Scaled:
    values = look_up(FP4_PAIRS_8, blocks[:, 4:36]).view(-1, 4, 8, 2).transpose(2, 3).reshape(-1, 64)
    return values, look_up(UE4M3_SCALES, blocks[:, :4])


def q1_0(blocks: Tensor) -> Scaled:
    signs = spread_bits(blocks[:, 2:18], 2)  # 2 or 0: minus 1 gives the sign
    return as_bytes(signs, 128).view(torch.int8).sub_(1), half(blocks, 0)


def q2_0(blocks: Tensor) -> Scaled:
    fields = blocks[:, 2:18].unsqueeze(-1) >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device)
    return (fields & 3).view(-1, 64).view(torch.int8).sub_(1), half(blocks, 0)
