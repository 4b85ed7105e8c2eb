"""Every decoder against gguf-py, bit for bit, on random blocks and on the ends of every range."""

from __future__ import annotations

import gguf
import gguf.quants
import numpy as np
import pytest
import torch

from ollamapy.errors import UnsupportedModel
from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant import dequant
from ollamapy.quant.dequant import DEQUANT, dequantize

IN_ORACLE = [type for type in DEQUANT if type not in (GGMLType.F64, GGMLType.Q1_0, GGMLType.Q2_0)]

# float16 fields of a block: where random bytes would make infinities and NaN
HALVES: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.F16: (0,),
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.IQ4_NL: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
    GGMLType.IQ4_XS: (0,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
    GGMLType.IQ1_S: (0,),
    GGMLType.IQ2_XXS: (0,),
    GGMLType.IQ2_XS: (0,),
    GGMLType.IQ2_S: (0,),
    GGMLType.IQ3_XXS: (0,),
    GGMLType.IQ3_S: (0,),
    GGMLType.Q1_0: (0,),
    GGMLType.Q2_0: (0,),
}
# 0, -0, smallest subnormals, largest subnormal, smallest normal, 1, -1, largest finite, and its negative
HALF_EXTREMES = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF)


def finite_halves(values: np.ndarray) -> np.ndarray:
    """uint16 patterns with the infinities and NaN turned into finite numbers."""
    return np.where(values & 0x7C00 == 0x7C00, values & 0xBFFF, values).astype("<u2")


def make_finite(type: GGMLType, blocks: np.ndarray) -> np.ndarray:
    for at in HALVES.get(type, ()):
        scale = blocks[:, at : at + 2].copy().view("<u2")
        blocks[:, at : at + 2] = finite_halves(scale).view(np.uint8)
    if type is GGMLType.IQ1_M:  # the scale's top nibble is that of the last uint16
        blocks[:, 55] &= 0xBF
    if type is GGMLType.BF16:
        blocks[:, 1] &= 0xBF
    if type is GGMLType.F32:
        blocks[:, 3] &= 0xBF
    return blocks


def random_blocks(type: GGMLType, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([seed, type])
    return make_finite(type, rng.integers(0, 256, (count, TYPES[type].type_size), dtype=np.uint8))


def extreme_blocks(type: GGMLType) -> np.ndarray:
    """Every pair of extreme scales over payloads of zeros, ones, and random bytes."""
    size, rows = TYPES[type].type_size, []
    fields = HALVES.get(type, ())
    random = random_blocks(type, 1, seed=7)[0]
    for payload in (np.zeros(size, np.uint8), np.full(size, 0xFF, np.uint8), np.full(size, 0x80, np.uint8), random):
        rows.append(payload.copy())
        for first in HALF_EXTREMES if fields else ():
            for second in HALF_EXTREMES if len(fields) > 1 else (first,):
                row = payload.copy()
                for at, value in zip(fields, (first, second), strict=False):
                    row[at : at + 2] = np.array([value], "<u2").view(np.uint8)
                rows.append(row)
    return make_finite(type, np.stack(rows))


def oracle(blocks: np.ndarray, type: GGMLType) -> np.ndarray:
    """gguf-py's values. Large MXFP4 scales overflow float32 by definition, there and here."""
    with np.errstate(over="ignore"):
        return gguf.quants.dequantize(blocks.copy(), gguf.GGMLQuantizationType(type))


def bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)


def assert_equal_bits(ours: torch.Tensor, theirs: np.ndarray) -> None:
    ours_bits, their_bits = bits(ours.numpy()), bits(theirs)
    wrong = np.flatnonzero(ours_bits != their_bits)
    assert wrong.size == 0, f"{wrong.size} of {ours_bits.size} differ, first at {wrong[0]}"


@pytest.mark.parametrize("type", IN_ORACLE, ids=lambda type: type.name)
@pytest.mark.parametrize("count", [1, 2, 37, 512])
def test_random_blocks(type: GGMLType, count: int) -> None:
    blocks = random_blocks(type, count, seed=count)
    width = TYPES[type].block_size
    ours = dequantize(torch.from_numpy(blocks), type, (count, width))
    assert ours.shape == (count, width) and ours.dtype == torch.float32
    assert_equal_bits(ours, oracle(blocks, type))


@pytest.mark.parametrize("type", IN_ORACLE, ids=lambda type: type.name)
def test_extremes(type: GGMLType) -> None:
    blocks = extreme_blocks(type)
    ours = dequantize(torch.from_numpy(blocks), type, (len(blocks), TYPES[type].block_size))
    assert_equal_bits(ours, oracle(blocks, type))
    if type is not GGMLType.MXFP4:
        assert torch.isfinite(ours).all()


@pytest.mark.parametrize("type", [GGMLType.MXFP4, GGMLType.NVFP4], ids=lambda type: type.name)
def test_every_scale_byte_of_the_fp4_types(type: GGMLType) -> None:
    blocks = random_blocks(type, 768)
    blocks[:, 0] = np.arange(768) % 256
    assert_equal_bits(dequantize(torch.from_numpy(blocks), type, (768, TYPES[type].block_size)), oracle(blocks, type))


def test_every_half_and_bfloat() -> None:
    patterns = np.arange(1 << 16, dtype="<u2")
    for type, special in ((GGMLType.F16, 0x7C00), (GGMLType.BF16, 0x7F80)):
        finite = patterns[patterns & special != special]
        ours = dequantize(torch.from_numpy(finite.view(np.uint8).copy()), type, (len(finite),))
        assert_equal_bits(ours, oracle(finite.view(np.uint8), type))


def scalar_q1_0(block: np.ndarray) -> list[float]:
    scale = float(block[:2].copy().view(np.float16)[0])
    return [scale if block[2 + index // 8] >> (index % 8) & 1 else -scale for index in range(128)]


def scalar_q2_0(block: np.ndarray) -> list[float]:
    scale = float(block[:2].copy().view(np.float16)[0])
    return [((block[2 + index // 4] >> (2 * (index % 4)) & 3) - 1.0) * scale for index in range(64)]


@pytest.mark.parametrize(("type", "scalar"), [(GGMLType.Q1_0, scalar_q1_0), (GGMLType.Q2_0, scalar_q2_0)])
def test_types_without_an_oracle_follow_their_definition(type: GGMLType, scalar: object) -> None:
    blocks = np.concatenate([random_blocks(type, 50), extreme_blocks(type)])
    ours = dequantize(torch.from_numpy(blocks), type, (len(blocks), TYPES[type].block_size))
    assert callable(scalar)
    expected = np.array([scalar(block) for block in blocks], dtype=np.float32)
    assert np.array_equal(ours.numpy(), expected)


def test_f64_is_rounded_to_float32() -> None:
    values = np.random.default_rng(1).standard_normal(100) * 1e30
    ours = dequantize(torch.from_numpy(values.view(np.uint8).copy()), GGMLType.F64, (100,))
    assert np.array_equal(ours.numpy(), values.astype(np.float32))


@pytest.mark.parametrize("type", [GGMLType.Q4_1, GGMLType.Q6_K, GGMLType.MXFP4, GGMLType.F16], ids=lambda type: type.name)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 8])
def test_any_alignment_of_the_bytes(type: GGMLType, offset: int) -> None:
    blocks = random_blocks(type, 6)
    storage = torch.zeros(offset + blocks.size, dtype=torch.uint8)
    storage[offset:] = torch.from_numpy(blocks.reshape(-1))
    width = TYPES[type].block_size
    ours = dequantize(storage[offset:], type, (2, 3 * width))
    assert torch.equal(ours.view(6, width), dequantize(torch.from_numpy(blocks), type, (6, width)))


@pytest.mark.parametrize("type", [GGMLType.Q8_0, GGMLType.Q3_K, GGMLType.IQ2_S], ids=lambda type: type.name)
def test_chunks_join_seamlessly(type: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    width = TYPES[type].block_size
    blocks = torch.from_numpy(random_blocks(type, 11))
    whole = dequantize(blocks, type, (11, width))
    monkeypatch.setattr(dequant, "CHUNK_WEIGHTS", 2 * width)
    assert torch.equal(dequantize(blocks, type, (11, width)), whole)


def test_other_output_dtypes_round_once() -> None:
    blocks = torch.from_numpy(random_blocks(GGMLType.Q4_K, 5))
    out = torch.empty(5, 256, dtype=torch.bfloat16)
    assert dequantize(blocks, GGMLType.Q4_K, (5, 256), out=out) is out
    assert torch.equal(out, dequantize(blocks, GGMLType.Q4_K, (5, 256)).bfloat16())


def test_all_weight_types_have_a_decoder() -> None:
    assert set(DEQUANT) == {type for type, info in TYPES.items() if info.weights}
    with pytest.raises(UnsupportedModel, match="Q8_K"):
        dequantize(torch.zeros(292, dtype=torch.uint8), GGMLType.Q8_K, (256,))
