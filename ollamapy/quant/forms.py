"""The types that kernels do not hold with the file's bits, and what they take. Tables only: placement reads them too.

A weight of such a type is one of at most 16 integers times a scale. The CPU kernels hold 4 bits of it, and a float32 scale for
each 32 or 16 (csrc/cpu/isa/coded.h); the GPU kernels 2 to 4 bits, a whole number for each 32 or 16, and a float32 step for 256.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ollamapy.gguf.types import GGMLType, tensor_nbytes

GROUP = 32  # weights of a block of a form
TILE_ROWS = 16

_ODD = tuple(range(-15, 16, 2))
_IQ1 = (-9, -7, -1, 1, 7, 9)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ2 = (8, 25, 43, -8, -25, -43)
_IQ3 = (4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62)


class Form(NamedTuple):
    """`values` by number; `scales` of each 32 weights."""

    values: tuple[int, ...]
    scales: int

    @property
    def block_bytes(self) -> int:
        return 4 * self.scales + GROUP // 2


CODED: dict[GGMLType, Form] = {
    GGMLType.IQ1_S: Form(_ODD, 1),
    GGMLType.IQ1_M: Form(_ODD, 2),
    GGMLType.IQ2_XXS: Form(_IQ2, 1),
    GGMLType.IQ2_XS: Form(_IQ2, 2),
    GGMLType.IQ2_S: Form(_IQ2, 2),
    GGMLType.IQ3_XXS: Form(_IQ3, 1),
    GGMLType.IQ3_S: Form(_ODD, 1),
    GGMLType.TQ1_0: Form(_FP4, 1),
    GGMLType.TQ2_0: Form(_FP4, 1),
    GGMLType.NVFP4: Form(_FP4, 2),
    GGMLType.Q1_0: Form(_ODD, 1),
    GGMLType.Q2_0: Form(_FP4, 1),
}


class Recoded(NamedTuple):
    """Of the GPU kernels: `values` by number; `scales` of each 32 weights, 0: one float16 step for all of a block."""

    values: tuple[int, ...]
    scales: int

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def head_bytes(self) -> int:
        """The step, and scales of 6 bits each, or of 8 where there are two for each 32 weights."""
        return (2, 4 + RECODED_BLOCK // GROUP * 6 // 8, 4 + RECODED_BLOCK // GROUP * 2)[self.scales]

    @property
    def block_bytes(self) -> int:
        return self.head_bytes + RECODED_BLOCK // 8 * self.bits


RECODED_BLOCK = 256  # weights of a block of every recoded type, in the file as on a GPU
RECODED: dict[GGMLType, Recoded] = {
    GGMLType.IQ1_S: Recoded(_IQ1, 1),
    GGMLType.IQ1_M: Recoded(_IQ1, 2),
    GGMLType.IQ2_XXS: Recoded(_IQ2, 1),
    GGMLType.IQ2_XS: Recoded(_IQ2, 2),
    GGMLType.IQ2_S: Recoded(_IQ2, 2),
    GGMLType.IQ3_XXS: Recoded(_IQ3, 1),
    GGMLType.IQ3_S: Recoded(_ODD, 1),
    GGMLType.TQ1_0: Recoded((-1, 0, 1), 0),
}
"""The types that the GPU kernels hold with other bits than the file's, and with its values."""


def planes_nbytes(type: GGMLType, shape: Sequence[int]) -> int:
    """Bytes of a tensor (..., columns) in the planes of the GPU kernels."""
    if type in RECODED:
        return math.prod(shape) // RECODED_BLOCK * RECODED[type].block_bytes
    return tensor_nbytes(GGMLType.BF16 if type is GGMLType.F64 else type, shape)  # the one type without planes


def packed_nbytes(type: GGMLType, shape: Sequence[int]) -> int:
    """Bytes of a matrix, or of several, (..., rows, columns), in tiles of 16 rows."""
    *leading, rows, columns = shape
    rows = -(-rows // TILE_ROWS) * TILE_ROWS
    if type in CODED:
        return math.prod(leading) * rows * columns // GROUP * CODED[type].block_bytes
    kept = GGMLType.F16 if type is GGMLType.F64 else type  # the one type without a kernel
    return tensor_nbytes(kept, (*leading, rows, columns))
