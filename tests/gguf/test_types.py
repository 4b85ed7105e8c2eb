"""The tables against gguf-py's, and sizes against plain arithmetic."""

from __future__ import annotations

import random

import gguf
import pytest

from ollamapy.gguf.types import (
    REMOVED_TYPES,
    TYPES,
    FileType,
    GGMLType,
    ValueType,
    align,
    base_type,
    file_type_name,
    num_elements,
    tensor_nbytes,
)


def test_types_equal_gguf_py() -> None:
    for theirs, (block_size, type_size) in gguf.GGML_QUANT_SIZES.items():
        info = TYPES[GGMLType[theirs.name]]
        if theirs.name == "Q8_1":  # gguf-py still has the form with float32 scales; ggml's has float16, 36 bytes
            type_size = 36
        assert (GGMLType[theirs.name], info.block_size, info.type_size) == (int(theirs), block_size, type_size)
    assert set(TYPES) == set(GGMLType) and not REMOVED_TYPES.keys() & {int(kind) for kind in GGMLType}
    assert {kind.name: int(kind) for kind in ValueType} == {kind.name: int(kind) for kind in gguf.GGUFValueType}


def test_file_types_equal_gguf_py() -> None:
    for theirs in gguf.LlamaFileType:
        if theirs.name != "GUESSED":
            assert FileType[theirs.name.removeprefix("MOSTLY_").removeprefix("ALL_")] == int(theirs)
    assert [file_type_name(number) for number in (0, 15, 3, 38, 4, 33, 1024, -1)] == [
        "F32", "Q4_K_M", "Q4_1", "MXFP4_MOE", "unknown", "unknown", "unknown", "unknown"]  # fmt: skip


def test_base_types() -> None:
    expected = {"Q4_K_M": "Q4_K", "Q3_K_L": "Q3_K", "Q2_K": "Q2_K", "Q2_K_S": "Q2_K", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S",
                "IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "MXFP4_MOE": "MXFP4", "F16": "F16", "Q8_0": "Q8_0"}  # fmt: skip
    assert {name: base_type(FileType[name]).name for name in expected} == expected
    assert all(base_type(kind) in TYPES for kind in FileType)


def test_sizes_never_wrap() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        kind = rng.choice(list(TYPES))
        info = TYPES[kind]
        shape = tuple(rng.choice((1, 3, 1 << 20, 1 << 40, (1 << 63) - 1)) for _ in range(rng.randrange(4)))
        row = rng.choice((1, 7, 1 << 30)) * info.block_size
        expected = info.type_size * (row // info.block_size)
        for size in shape:
            expected *= size
        assert tensor_nbytes(kind, (*shape, row)) == expected
        assert num_elements((*shape, row)) * info.type_size == expected * info.block_size
    assert tensor_nbytes(GGMLType.F16, ()) == 2
    with pytest.raises(ValueError, match="whole Q6_K blocks of 256"):
        tensor_nbytes(GGMLType.Q6_K, (2, 255))


@pytest.mark.parametrize(
    ("offset", "alignment", "expected"), [(0, 32, 0), (1, 32, 32), (32, 32, 32), (33, 1, 33), (7, 4096, 4096)]
)
def test_align(offset: int, alignment: int, expected: int) -> None:
    assert align(offset, alignment) == expected
