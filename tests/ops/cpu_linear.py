"""Checks of packing and of `linear` on packed weights, against float64 and an int8 rule of our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ollamapy import cpu_kernels, reference
from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.coded import cpu_table
from ollamapy.quant.dequant import dequantize
from ollamapy.quant.forms import CODED, packed_nbytes
from ollamapy.quant.tensor import QuantTensor
from tests.quant.coded_rows import coded_rows
from tests.quant.test_dequant import HALVES, extreme_blocks, random_blocks

CPU = torch.device("cpu")
DENSE = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
TYPES_HELD = sorted(cpu_kernels.PACKED | set(CODED))
QUANTIZED = sorted(set(TYPES_HELD) - set(DENSE))
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 33, 130)
ROUNDING = 2.0**-24  # of one float32 operation


def make_weight(type: GGMLType, rows: int, blocks: int, seed: int = 0) -> QuantTensor:
    """Random bits, finite scales of every size."""
    info = TYPES[type]
    data = random_blocks(type, rows * blocks, seed)
    if type is GGMLType.MXFP4:  # exponents up to 2^127 overflow in any order
        data[:, 0] = 90 + data[:, 0] % 60
    return QuantTensor(torch.from_numpy(data.reshape(rows, -1)), type, (rows, blocks * info.block_size))


def columns(type: GGMLType) -> tuple[int, ...]:
    """Blocks of a row: one, a few, and across the edge of a panel of 512."""
    if type in DENSE:
        return (1, 7, 33, 100)
    return (1, 2, 3, 17) if TYPES[type].block_size <= 64 else (1, 2, 3)


def activations(rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes: zeros, one spike, tiny, huge, and plain ones."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    kinds = [
        None,
        lambda row: row.zero_(),
        lambda row: row[1:].zero_(),
        lambda row: row.mul_(1e-30),
        lambda row: row.mul_(1e20),
    ]
    for i in range(rows):
        change = kinds[i % 9] if i % 9 < len(kinds) else None
        if change is not None:
            change(x[i])
    if rows > 6:
        x[6, width // 2] = 3000.0
    return x


def int8_activations(x: Tensor) -> Tensor:
    """What quantized weights see of x (m, K) float32: int8 per 32 times a float32 scale, as float64."""
    groups = x.numpy().reshape(x.shape[0], -1, 32)
    top = np.abs(groups).max(-1, keepdims=True)
    seen = top > np.float32(4e-37)
    factor = np.divide(np.float32(127), top, out=np.zeros_like(top), where=seen)
    scale = np.where(seen, top / np.float32(127), np.float32(0))
    quants = np.rint(groups * factor)
    assert np.abs(quants).max() <= 127
    return torch.from_numpy((quants.astype(np.float64) * scale.astype(np.float64)).reshape(x.shape))


def spread(weight: QuantTensor) -> Tensor:
    """|scale x quant| + |min| of each weight (N, K) float64: what the sums of a group are made of."""
    whole = weight.dequantize().double()
    fields = HALVES.get(weight.type, ())
    if len(fields) < 2:
        return whole.abs()
    blocks = weight.data.view(-1, TYPES[weight.type].type_size).clone()
    blocks[:, fields[1] : fields[1] + 2] = 0
    scaled = dequantize(blocks, weight.type, weight.shape).double()
    return scaled.abs() + (whole - scaled).abs()


def rounding_bound(weight: QuantTensor, seen: Tensor) -> Tensor:
    """(m, N): float32 rounding of the sum over groups of 32. At most four additions a group, each with a product that the
    portable kernels round too, and six roundings inside a term (its scales, and the decoded weight compared with)."""
    operations = 2 * weight.shape[1] if weight.type in DENSE else 8 * (weight.shape[1] // 32)
    return (operations + 6) * ROUNDING * (seen.abs() @ spread(weight).T) + 1e-37


def rows_held(weight: QuantTensor) -> Tensor:
    """What the tiles hold of each row: the file's bytes, or the form of few values."""
    return coded_rows(weight) if weight.type in CODED else weight.data


def check_pack() -> None:
    ops = cpu_kernels.kernels()
    for type in TYPES_HELD:
        table = cpu_table(type)
        for rows in (1, 15, 16, 17, 37):
            for blocks in columns(type):
                weight = make_weight(type, rows, blocks)
                held = rows_held(weight)
                tiles = ops.pack_weight(weight.data, int(type), weight.shape[1], table)
                assert tiles.shape == (-(-rows // 16), 16 * held.shape[1])
                back = ops.unpack_weight(tiles, int(type), rows, weight.shape[1])
                assert torch.equal(back, held), (type.name, rows, blocks)
                padded = ops.unpack_weight(tiles, int(type), len(tiles) * 16, weight.shape[1])
                assert not padded[rows:].any(), (type.name, rows, blocks)
        width = 2 * TYPES[type].block_size
        experts = torch.stack([make_weight(type, 17, 2, seed).data for seed in range(3)])
        together = ops.pack_weight(experts, int(type), width, table)
        apart = [ops.pack_weight(expert, int(type), width, table) for expert in experts]
        assert torch.equal(together, torch.stack(apart)), type.name
        weight = make_weight(type, 1000, 3)
        packed = cpu_kernels.prepare_linear(weight, CPU)
        assert packed.data.numel() == packed_nbytes(type, weight.shape) <= 1.03 * rows_held(weight).numel()


def check_codes() -> None:
    """Types of few values, to the bit, in pieces for several threads: every entry of a codebook with either sign (all but a
    chance of e^-90), every byte, and the ends of the scales."""
    width, rows = 41 * 256, 300
    for type in CODED:
        blocks = torch.from_numpy(random_blocks(type, rows * width // TYPES[type].block_size))
        ends = torch.from_numpy(extreme_blocks(type))
        blocks[: len(ends)] = ends
        if type is GGMLType.NVFP4:
            blocks[-256:, 3] = torch.arange(256)
        weight = QuantTensor(blocks.view(rows, -1), type, (rows, width))
        packed = cpu_kernels.prepare_linear(weight, CPU)
        back = cpu_kernels.kernels().unpack_weight(packed.data, int(type), rows, width)
        assert torch.equal(back, coded_rows(weight)), type.name


def check_rows() -> None:
    """Rows out of tiles have the bits of rows out of the file."""
    for type in sorted(cpu_kernels.PACKED):
        for rows, blocks in zip((37, 1, 100, 17), columns(type), strict=False):
            weight = make_weight(type, rows, blocks)
            packed = cpu_kernels.prepare_linear(weight, CPU)
            for ids in (torch.arange(rows), torch.tensor([rows - 1, 0, rows // 2, 0]), torch.zeros(0, dtype=torch.int64)):
                got = cpu_kernels.embedding(ids, packed)
                assert torch.equal(got.view(torch.int32), weight.gather(ids).view(torch.int32)), (type.name, rows, blocks)


def _cases(types: list[GGMLType]) -> Iterator[tuple[QuantTensor, cpu_kernels.Packed]]:
    for type in types:
        for blocks, rows in zip(columns(type), (37, 1, 100, 17), strict=False):
            weight = make_weight(type, rows, blocks, seed=blocks)
            yield weight, cpu_kernels.prepare_linear(weight, CPU)


def _share(got: Tensor, expected: Tensor, bound: Tensor) -> float:
    return float(((got.double() - expected).abs() / bound).max())


def check_values() -> dict[str, tuple[float, float]]:
    """Type -> largest error as a share of the rounding bound, and of the int8 bound to float activations."""
    worst: dict[str, tuple[float, float]] = {}
    for weight, packed in _cases(TYPES_HELD):
        x = activations(130, weight.shape[1])
        dense = weight.type in DENSE
        seen = x.double() if dense else int8_activations(x)
        wide, bias = weight.dequantize().double(), torch.randn(weight.shape[0])
        bound = rounding_bound(weight, seen)
        error = torch.zeros_like(bound)
        if not dense:  # half a step, of max / 127 per 32, for each weight; and the groups that count as zeros
            step = x.double().view(130, -1, 32).abs().amax(-1) / 254 * (1 + 1e-6) + 4e-37
            error = step @ wide.abs().view(weight.shape[0], -1, 32).sum(-1).T
        expected, plain = seen @ wide.T, reference.linear(x, weight.dequantize())
        plain_bound = bound + error + rounding_bound(weight, x.double())
        shares = worst.get(weight.type.name, (0.0, 0.0))
        for rows in ROWS:
            got = cpu_kernels.linear(x[:rows], packed)
            assert got.shape == (rows, weight.shape[0])
            here = _share(got, expected[:rows], bound[:rows]), _share(got, plain[:rows].double(), plain_bound[:rows])
            shares = max(shares[0], here[0]), max(shares[1], here[1])
        worst[weight.type.name] = shares
        assert max(shares) <= 1.0, (weight.type.name, weight.shape, shares)
        with_bias = cpu_kernels.linear(x, packed, bias)
        assert torch.equal(with_bias, cpu_kernels.linear(x, packed) + bias)
    return worst


def check_precise() -> dict[str, float]:
    """Type -> largest error to float32 activations as a share of the bound: roundings of three planes, each a sum over groups,
    and what the planes leave of an activation: half a step of the last, 2^-24 of the group's largest, and two roundings."""
    worst: dict[str, float] = {}
    for type in QUANTIZED:
        weight = make_weight(type, 37, 17 if TYPES[type].block_size == 32 else 3)
        packed = cpu_kernels.prepare_precise(weight, CPU)
        assert packed.planes == cpu_kernels.PLANES
        x = activations(40, weight.shape[1])
        wide = weight.dequantize().double()
        lost = (x.double().view(40, -1, 32).abs().amax(-1) * 3 * ROUNDING + 4e-37) @ wide.abs().view(37, -1, 32).sum(-1).T
        # A plane's quants reach to the group's largest, whatever the sizes beside it.
        top = x.double().view(40, -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(40, -1)
        bound = lost + 2 * rounding_bound(weight, top)
        whole = cpu_kernels.linear(x, packed)
        worst[type.name] = _share(whole, x.double() @ wide.T, bound)
        assert worst[type.name] <= 1.0, (type.name, worst)
        for rows in (1, 2, 5, 9):
            assert torch.equal(cpu_kernels.linear(x[3 : 3 + rows], packed), whole[3 : 3 + rows]), type
        bias = torch.randn(37)
        assert torch.equal(cpu_kernels.linear(x, packed, bias), whole + bias)
        plain = cpu_kernels.linear(x, cpu_kernels.prepare_linear(weight, CPU))
        assert (plain.double() - x.double() @ wide.T).norm() > 50 * (whole.double() - x.double() @ wide.T).norm(), type
    return worst


def check_rows_are_alone() -> None:
    """A row's bits are the same alone, in any batch, beside anything, on any number of threads."""
    for weight, packed in _cases(TYPES_HELD):
        x = activations(130, weight.shape[1], seed=1)
        whole = cpu_kernels.linear(x, packed)
        for rows in ROWS:
            for first in {0, 130 - rows, (130 - rows) // 2}:
                assert torch.equal(cpu_kernels.linear(x[first : first + rows], packed), whole[first : first + rows]), (
                    weight.type
                )
        for threads in (1, 3):
            cpu_kernels.kernels().set_threads(threads)
            assert torch.equal(cpu_kernels.linear(x, packed), whole)
            assert torch.equal(cpu_kernels.linear(x[:1], packed), whole[:1])
        cpu_kernels.kernels().set_threads(2)


def check_bad_numbers() -> None:
    """Infinities and NaN in a row of x make that row NaN (or infinite), and touch no other."""
    for weight, packed in _cases(TYPES_HELD):
        x = activations(9, weight.shape[1], seed=2)
        whole = cpu_kernels.linear(x, packed)
        for bad in (torch.nan, torch.inf, -torch.inf):
            for rows in (1, 4, 9):
                marred = x[:rows].clone()
                marred[rows // 2, weight.shape[1] // 2] = bad
                got = cpu_kernels.linear(marred, packed)
                others = [i for i in range(rows) if i != rows // 2]
                assert not torch.isfinite(got[rows // 2]).any() or weight.type in DENSE, weight.type
                assert not (torch.isfinite(got[rows // 2]) & (weight.dequantize()[:, weight.shape[1] // 2] != 0)).any()
                assert torch.equal(got[others], whole[others]), weight.type


def checks() -> list[Any]:
    return [check_pack, check_codes, check_rows, check_values, check_precise, check_rows_are_alone, check_bad_numbers]
