"""What the numbers in a GGUF file mean: tensor types, metadata value types, file types, and the sizes that follow.

Pure tables (from ggml's `ggml.h` and llama.cpp's `llama.h`); knows nothing of files or tensors' contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

QK_K = 256  # weights in a super-block of the K and IQ types
MAX_DIMS = 4


class GGMLType(IntEnum):
    """Element type of a tensor (`ggml_type`)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


REMOVED_TYPES = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Ids that ggml once gave out and withdrew: files that use them must be made again."""


class TypeInfo(NamedTuple):
    """A type's layout: `type_size` bytes hold `block_size` consecutive elements of a row."""

    name: str
    block_size: int
    type_size: int
    weights: bool = True  # False: integers, and formats that hold activations only


def _info(type: GGMLType, block_size: int, type_size: int, weights: bool = True) -> tuple[GGMLType, TypeInfo]:
    return type, TypeInfo(type.name, block_size, type_size, weights)


TYPES: dict[GGMLType, TypeInfo] = dict(
    [
        _info(GGMLType.F32, 1, 4),
        _info(GGMLType.F16, 1, 2),
        _info(GGMLType.BF16, 1, 2),
        _info(GGMLType.F64, 1, 8),
        _info(GGMLType.I8, 1, 1, weights=False),
        _info(GGMLType.I16, 1, 2, weights=False),
        _info(GGMLType.I32, 1, 4, weights=False),
        _info(GGMLType.I64, 1, 8, weights=False),
        _info(GGMLType.Q4_0, 32, 18),
        _info(GGMLType.Q4_1, 32, 20),
        _info(GGMLType.Q5_0, 32, 22),
        _info(GGMLType.Q5_1, 32, 24),
        _info(GGMLType.Q8_0, 32, 34),
        _info(GGMLType.Q8_1, 32, 36, weights=False),
        _info(GGMLType.Q2_K, QK_K, 84),
        _info(GGMLType.Q3_K, QK_K, 110),
        _info(GGMLType.Q4_K, QK_K, 144),
        _info(GGMLType.Q5_K, QK_K, 176),
        _info(GGMLType.Q6_K, QK_K, 210),
        _info(GGMLType.Q8_K, QK_K, 292, weights=False),
        _info(GGMLType.IQ1_S, QK_K, 50),
        _info(GGMLType.IQ1_M, QK_K, 56),
        _info(GGMLType.IQ2_XXS, QK_K, 66),
        _info(GGMLType.IQ2_XS, QK_K, 74),
        _info(GGMLType.IQ2_S, QK_K, 82),
        _info(GGMLType.IQ3_XXS, QK_K, 98),
        _info(GGMLType.IQ3_S, QK_K, 110),
        _info(GGMLType.IQ4_NL, 32, 18),
        _info(GGMLType.IQ4_XS, QK_K, 136),
        _info(GGMLType.TQ1_0, QK_K, 54),
        _info(GGMLType.TQ2_0, QK_K, 66),
        _info(GGMLType.MXFP4, 32, 17),
        _info(GGMLType.NVFP4, 64, 36),
        _info(GGMLType.Q1_0, 128, 18),
        _info(GGMLType.Q2_0, 64, 18),
    ]
)


class ValueType(IntEnum):
    """Type of a metadata value (`gguf_metadata_value_type`)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALAR_FORMATS: dict[ValueType, str] = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",  # 0 or 1; anything else is refused
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
"""`struct` letter of each fixed-size value; little endian, no padding."""


class FileType(IntEnum):
    """`general.file_type` (`llama_ftype`): the type that most of a file's matrices have."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q8_0 = 7
    Q5_0 = 8
    Q5_1 = 9
    Q2_K = 10
    Q3_K_S = 11
    Q3_K_M = 12
    Q3_K_L = 13
    Q4_K_S = 14
    Q4_K_M = 15
    Q5_K_S = 16
    Q5_K_M = 17
    Q6_K = 18
    IQ2_XXS = 19
    IQ2_XS = 20
    Q2_K_S = 21
    IQ3_XS = 22
    IQ3_XXS = 23
    IQ1_S = 24
    IQ4_NL = 25
    IQ3_S = 26
    IQ3_M = 27
    IQ2_S = 28
    IQ2_M = 29
    IQ4_XS = 30
    IQ1_M = 31
    BF16 = 32
    TQ1_0 = 36
    TQ2_0 = 37
    MXFP4_MOE = 38
    NVFP4 = 39
    Q1_0 = 40
    Q2_0 = 41


_BASE_TYPES = {
    FileType.IQ3_XS: GGMLType.IQ3_S,
    FileType.IQ3_M: GGMLType.IQ3_S,
    FileType.IQ2_S: GGMLType.IQ2_XS,
    FileType.IQ2_M: GGMLType.IQ2_S,
    FileType.MXFP4_MOE: GGMLType.MXFP4,
}


def base_type(file_type: FileType) -> GGMLType:
    """The tensor type a mix is named after: Q4_K_M -> Q4_K, IQ3_XS -> IQ3_S."""
    if file_type in _BASE_TYPES:
        return _BASE_TYPES[file_type]
    name = file_type.name
    return GGMLType[name[:-2] if name.endswith(("_K_S", "_K_M", "_K_L")) else name]


def file_type_name(file_type: int) -> str:
    """The text that `show` and `list` print for `general.file_type`: "Q4_K_M"; "unknown" for ids without a name."""
    return FileType(file_type).name if file_type in FileType._value2member_map_ else "unknown"


def num_elements(shape: Sequence[int]) -> int:
    """Product of the dimensions; 1 for a scalar. Python integers: never wraps."""
    count = 1
    for size in shape:
        count *= size
    return count


def row_nbytes(type: GGMLType, length: int) -> int:
    """Bytes of a row of `length` elements. ValueError when the length is not whole blocks."""
    info = TYPES[type]
    if length % info.block_size:
        raise ValueError(f"rows of {length} elements are not whole {info.name} blocks of {info.block_size}")
    return length // info.block_size * info.type_size


def tensor_nbytes(type: GGMLType, shape: Sequence[int]) -> int:
    """Bytes of a tensor whose shape is in torch order (rows last). ValueError as `row_nbytes`."""
    row = row_nbytes(type, shape[-1] if shape else 1)
    return num_elements(shape[:-1]) * row


def align(offset: int, alignment: int) -> int:
    """The least multiple of `alignment` that is not below `offset`."""
    return -(-offset // alignment) * alignment


class GGUFValue(NamedTuple):
    """A metadata value with its exact type; when `value` is a list, an array whose (innermost) elements have `type`."""

    type: ValueType
    value: Any
