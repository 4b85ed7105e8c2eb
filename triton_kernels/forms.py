"""The quantization types as the kernels see them: where a block keeps what, and what kernel templates are told. Tables only."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

from ollamapy.gguf.types import GGMLType
from ollamapy.quant.forms import RECODED, RECODED_BLOCK
from ollamapy.quant.legacy import FP4_VALUES, IQ4_VALUES

GROUP = 32


class Scale(IntEnum):
    """How the scale of a group, or of its two halves, is stored."""

    STEP = 0  # d alone, one per group
    E8M0 = 1  # d is a power of two as a byte, one per group
    PAIRS = 2  # two 6-bit numbers per group: low nibbles in a byte, then the high bits of two groups in a byte
    BYTES = 3  # two int8 per group, one for each half
    NIBBLES = 4  # two bytes per group, one for each half: scale in the low nibble, min in the high nibble
    SIXES = 5  # one 6-bit number per group: low nibbles of two groups in a byte, then the high bits of four in a byte
    UE4M3 = 6  # two bytes per group, one for each half: floats of 4 bits of exponent and 3 of mantissa, halved; no d
    STEP_64 = 7  # d alone, one per two groups
    STEP_128 = 8  # d alone, one per four
    STEP_256 = 9  # d alone, one per eight


class Field(NamedTuple):
    """Where a block keeps a code's bits: from byte `start`, runs of `width` bytes; a run's lowest bit fields come first."""

    start: int
    runs: int
    width: int
    bits: int

    @property
    def stop(self) -> int:
        return self.start + self.runs * self.width


class Form(NamedTuple):
    """A quantization type as the kernels see it; what is not of the layout is a parameter of the kernel templates."""

    low: Field
    high: Field | None
    scale: Scale
    d: int | None  # byte of the block's step
    m: int | None = None  # byte of its min (legacy types) or of the step of its mins (K-quants)
    scales: tuple[int, int] = (0, 0)  # bytes of the block's packed scales
    offset: int = 0  # subtracted from a code
    scale_offset: int = 0  # subtracted from a 6-bit scale
    table: tuple[int, int, int, int] = (0, 0, 0, 0)  # 16 int8 values of the codes, as four int32; zeros: a code is its value
    step: torch.dtype = torch.float16

    @property
    def two_scales(self) -> bool:
        """Whether the halves of a group have scales of their own."""
        return self.scale in (Scale.BYTES, Scale.NIBBLES, Scale.UE4M3) or (self.scale is Scale.PAIRS and self.m is None)


def _table(values: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Of at most 16 values, at least five: the second word of a table must not be zero (`decode`)."""
    padded = bytes(value & 255 for value in values).ljust(16, b"\0")
    words = [int.from_bytes(padded[i : i + 4], "little", signed=True) for i in (0, 4, 8, 12)]
    return words[0], words[1], words[2], words[3]


def _recoded(type: GGMLType) -> Form:
    """Of blocks as `quant.coded.recoded` writes them."""
    held = RECODED[type]
    bits, start = 4 if held.bits == 4 else 2, held.head_bytes
    low = Field(start, RECODED_BLOCK * bits // 256, 32, bits)
    if held.scales == 0:
        return Form(low, None, Scale.STEP_256, d=0, offset=1)
    return Form(
        low,
        Field(low.stop, 1, 32, 1) if held.bits > bits else None,
        Scale.SIXES if held.scales == 1 else Scale.BYTES,
        d=0,
        scales=(4, start),
        table=_table(held.values),
        step=torch.float32,
    )


FORMS: dict[GGMLType, Form] = {
    GGMLType.Q4_0: Form(Field(2, 1, 16, 4), None, Scale.STEP, d=0, offset=8),
    GGMLType.Q4_1: Form(Field(4, 1, 16, 4), None, Scale.STEP, d=0, m=2),
    GGMLType.Q5_0: Form(Field(6, 1, 16, 4), Field(2, 4, 1, 1), Scale.STEP, d=0, offset=16),
    GGMLType.Q5_1: Form(Field(8, 1, 16, 4), Field(4, 4, 1, 1), Scale.STEP, d=0, m=2),
    GGMLType.Q8_0: Form(Field(2, 1, 32, 8), None, Scale.STEP, d=0),
    GGMLType.Q2_K: Form(Field(16, 2, 32, 2), None, Scale.NIBBLES, d=80, m=82, scales=(0, 16)),
    GGMLType.Q3_K: Form(
        Field(32, 2, 32, 2), Field(0, 1, 32, 1), Scale.PAIRS, d=108, scales=(96, 108), offset=4, scale_offset=32
    ),
    GGMLType.Q4_K: Form(Field(16, 4, 32, 4), None, Scale.PAIRS, d=0, m=2, scales=(4, 16)),
    GGMLType.Q5_K: Form(Field(48, 4, 32, 4), Field(16, 1, 32, 1), Scale.PAIRS, d=0, m=2, scales=(4, 16)),
    GGMLType.Q6_K: Form(Field(0, 2, 64, 4), Field(128, 2, 32, 2), Scale.BYTES, d=208, scales=(192, 208), offset=32),
    GGMLType.IQ4_NL: Form(Field(2, 1, 16, 4), None, Scale.STEP, d=0, table=_table(IQ4_VALUES)),
    GGMLType.IQ4_XS: Form(Field(8, 8, 16, 4), None, Scale.SIXES, d=0, scales=(2, 8), scale_offset=32, table=_table(IQ4_VALUES)),
    GGMLType.MXFP4: Form(Field(1, 1, 16, 4), None, Scale.E8M0, d=0, table=_table(FP4_VALUES), step=torch.uint8),
    GGMLType.NVFP4: Form(Field(4, 4, 8, 4), None, Scale.UE4M3, d=None, scales=(0, 4), table=_table(FP4_VALUES)),
    GGMLType.Q1_0: Form(Field(2, 16, 1, 1), None, Scale.STEP_128, d=0, table=_table((-1, 1) * 8)),
    GGMLType.Q2_0: Form(Field(2, 16, 1, 2), None, Scale.STEP_64, d=0, offset=1),
    GGMLType.TQ2_0: Form(Field(0, 2, 32, 2), None, Scale.STEP_256, d=64, offset=1),
    **{type: _recoded(type) for type in RECODED},
}
