"""Kernels that read packed weights, interpreted: dequantize, embedding, matvec, matmul, against quant and float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ollamapy import reference
from ollamapy.gguf.types import TYPES as SIZES
from ollamapy.gguf.types import GGMLType
from ollamapy.quant.tensor import QuantTensor
from ollamapy.triton_kernels import embedding, int8, layout, linear, norm, tuning
from ollamapy.triton_kernels.forms import FORMS
from tests.quant.test_dequant import random_blocks
from tests.triton.data import random_weight

# exp of a large number is infinite and its inverse zero, as on a GPU; numpy, which interprets, says so
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

CPU = torch.device("cpu")
TYPES = pytest.mark.parametrize("type", FORMS, ids=lambda type: type.name)


@TYPES
@pytest.mark.parametrize("columns", [256, 768, 352])
def test_dequantize_and_embedding(type: GGMLType, columns: int) -> None:
    """Bit for bit, with subnormal, negative and huge steps; one block a row, several, and rows that end within a tile."""
    if columns % SIZES[type].block_size:
        pytest.skip("rows are whole blocks")
    blocks = random_blocks(type, 5 * columns // SIZES[type].block_size)
    if type is GGMLType.MXFP4:
        blocks[:, 0] %= 251  # the largest powers of two overflow with the code
        blocks[:3, 0] = (0, 1, 2)
    if type is GGMLType.NVFP4:
        blocks[:4, 0] = (0, 127, 128, 255)
    weight = QuantTensor.wrap(torch.from_numpy(blocks).flatten(), type, (5, columns))
    planes = layout.pack(weight)
    assert torch.equal(embedding.dequantize(planes, torch.float32), weight.dequantize())
    ids = torch.tensor([4, 0, 4, 2, 1, 3])
    assert torch.equal(embedding.embedding(ids, planes), reference.embedding(ids, weight))


def matvec(x: Tensor, planes: layout.Planes, **more: object) -> Tensor:
    return linear.matvec(x, planes, torch.empty(x.shape[0], planes.shape[-2]), **more)


def matmul(x: Tensor, planes: layout.Planes, dot: torch.dtype) -> Tensor:
    return linear.matmul(x, planes, torch.empty(x.shape[0], planes.shape[-2]), dot=dot)


def tune(monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuning.Table:
    """Other numbers than those of the table."""
    table = dataclasses.replace(tuning.of(CPU), **changes)
    monkeypatch.setattr(tuning, "of", lambda device: table)
    return table


def check(got: Tensor, x: Tensor, weight: QuantTensor, tolerance: float) -> None:
    """Within `tolerance` of the exact product, relative to the sum of its terms' magnitudes."""
    exact = weight.dequantize().double()
    error = (got.double() - x.double() @ exact.t()).abs() / (x.double().abs() @ exact.abs().t())
    assert error.max() < tolerance, error.max()


@TYPES
@pytest.mark.parametrize("rows", [1, 3])
def test_matvec(type: GGMLType, rows: int) -> None:
    """float32: as good as any order of a sum. K ends within a step, columns within a tile; 37 columns are split over K."""
    weight = random_weight(type, 37, 1280)
    x = torch.randn(rows, 1280, generator=torch.Generator().manual_seed(rows))
    assert linear.splits_of(5, 264, 40, 32)[0] == 1
    check(matvec(x, layout.pack(weight)), x, weight, 2e-7)


@TYPES
@pytest.mark.parametrize(("rows", "dot", "tolerance"), [(21, torch.float32, 4e-7), (5, torch.float16, 2**-11)])
def test_matmul(type: GGMLType, rows: int, dot: torch.dtype, tolerance: float) -> None:
    """Weights and x are each rounded once to `dot`: at most two half units in the last place, on the sum's magnitude."""
    weight = random_weight(type, 37, 768)
    x = torch.randn(rows, 768, generator=torch.Generator().manual_seed(rows))
    check(matmul(x, layout.pack(weight), dot), x, weight, tolerance)


@pytest.mark.parametrize("type", [GGMLType.Q5_1, GGMLType.Q8_0], ids=lambda type: type.name)
def test_matmul_ends_within_a_step(type: GGMLType) -> None:
    """11 groups in steps of 4: what lies beyond a row of x is the next row, and must not be added."""
    weight = random_weight(type, 37, 352)
    x = torch.randn(21, 352, generator=torch.Generator().manual_seed(0))
    check(matmul(x[:20], layout.pack(weight), torch.float32), x[:20], weight, 4e-7)


@pytest.mark.parametrize("rows", [2, 4, 40, 70, 130])
def test_every_tile(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of the tables, in bfloat16 where there are tensor cores, with x of both types that a model runs in."""
    monkeypatch.setattr(tuning, "activations", lambda device, precise=False: torch.bfloat16)
    weight = random_weight(GGMLType.Q4_K, 70, 512)
    planes = layout.pack(weight)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0))
    check(linear.linear(x, planes), x, weight, 2e-7 if rows <= 4 else 2**-7)
    bias = torch.randn(70)
    got = linear.linear(x.bfloat16(), planes, bias.bfloat16())
    assert got.dtype == torch.bfloat16
    check(got.float() - bias.bfloat16().float(), x.bfloat16(), weight, 2**-6)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.parametrize("programs", [1, 264], ids=["whole K", "split K"])
def test_ends(kind: reference.Activation, rows: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bias, residual stream, and gate with up, in every kernel that can end a product: columns of a wider output, too."""
    tune(monkeypatch, programs=programs, matvec=tuning.Tile(4, 8, 2, 4, 1), tiles=(tuning.Tile(16, 32, 2, 4, 3),))
    assert linear.splits_of(3, programs, 16, 2)[0] == (1 if programs == 1 else 2)
    gate, up = (random_weight(GGMLType.Q8_0, 19, 512, seed=seed) for seed in (1, 2))
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(0))
    parts = [layout.pack(gate), layout.pack(up)]
    joined = layout.join(parts)
    g, u = (x.double() @ weight.dequantize().double().t() for weight in (gate, up))
    scale = float((x.double().abs() @ gate.dequantize().double().abs().t()).max())
    wide = torch.full((rows, 40), 7.0)
    out = linear.project(x, parts[0], wide[:, 3:22], bias=torch.arange(19.0), add=True)
    torch.testing.assert_close(out.double(), g + torch.arange(19.0) + 7.0, rtol=0, atol=4e-7 * (scale + 30))
    assert (wide[:, :3] == 7).all() and (wide[:, 22:] == 7).all()
    got = linear.project(x, joined, torch.empty(rows, 19), gate=kind)
    # each factor is off by at most 4e-7 of its sum's magnitude, and |act'| < 1.2
    bound = 4e-7 * scale * (1.2 * float(u.abs().max()) + float(g.abs().max())) + 1e-6
    torch.testing.assert_close(got.double(), reference.gated_activation(g, u, kind), rtol=1e-5, atol=bound)


def test_split_k(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(GGMLType.Q6_K, 20, 4096)
    planes = layout.pack(weight)
    x = torch.randn(2, 4096, generator=torch.Generator().manual_seed(0))
    tune(monkeypatch, matvec=tuning.Tile(4, 8, 8, 4, 1))
    assert linear.splits_of(3, 264, 128, 8) == (4, 32)
    check(matvec(x, planes), x, weight, 2e-7)
    check(matmul(x, planes, torch.float32), x, weight, 4e-7)


def test_many_rows_are_decoded_once() -> None:
    weight = random_weight(GGMLType.Q5_K, 24, 256)
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    planes = linear.prepare_linear(weight, CPU)
    assert [linear.choose_path(rows, planes) for rows in (1, 4, 5, 255, 256)] == ["matvec", "matvec", "tiles", "tiles", "layer"]
    check(linear.linear(x, planes), x, weight, 2**-7)


@TYPES
@pytest.mark.parametrize("columns", [256, 1280])
def test_int8(type: GGMLType, columns: int) -> None:
    """The exact product of the quantized activations, up to float32 sums over groups; K of a step, and split."""
    weight = random_weight(type, 37, columns)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(0))
    codes = norm.quantize(x)
    values = codes.codes.view(5, -1, 16, 2).transpose(2, 3).flatten(2).float() * codes.steps.unsqueeze(2)
    got = linear.int8_matmul(x, layout.pack(weight), torch.empty(5, 37))
    check(got, values.flatten(1), weight, 1e-6)
    check(got, x, weight, 2**-6)  # half a step of the group's largest: 1 / 254 of it, and all terms may add


def test_int8_rows_are_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in batches of every tile, with and without the ends of `project`."""
    tune(monkeypatch, matvec_rows=0, int8_rows=1 << 30, programs=4)
    planes = layout.pack(random_weight(GGMLType.Q4_K, 70, 1280))
    assert int8.splits_of(70, 4, 40, tuning.of(CPU).int8_tile(1))[0] == 2
    x = torch.randn(70, 1280, generator=torch.Generator().manual_seed(0))
    stream, bias = torch.randn(70, 70), torch.randn(70)
    whole = linear.project(x, planes, stream.clone(), bias, add=True)
    for start, stop in ((0, 1), (5, 18), (30, 70), (3, 64)):
        part = linear.project(x[start:stop].contiguous(), planes, stream[start:stop].clone(), bias, add=True)
        assert torch.equal(part, whole[start:stop])


def test_large_activations_of_float16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before `down` pass 65504 in some models: as float16 they would be infinite."""
    monkeypatch.setattr(tuning, "activations", lambda device, precise=False: torch.bfloat16)
    weight = QuantTensor(torch.full((8, 32), 0.5).half().view(torch.uint8), GGMLType.F16, (8, 32))
    found = linear.linear(torch.full((3, 32), 1e5, dtype=torch.bfloat16), linear.prepare_linear(weight, torch.device("cpu")))
    assert torch.equal(found.float(), torch.full((3, 8), 32 * 0.5 * 1e5).bfloat16().float())


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.IQ2_XXS], ids=lambda t: t.name)
def test_dense_types(type: GGMLType) -> None:
    blocks = random_blocks(type, 3 * 256 // SIZES[type].block_size)
    if type in layout.DENSE:
        values = torch.randn(3, 256).to(layout.DENSE[type])
        weight = QuantTensor.wrap(values.view(torch.uint8).flatten(), type, (3, 256))
    else:
        weight = QuantTensor.wrap(torch.from_numpy(blocks).flatten(), type, (3, 256))
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    check(linear.linear(x, linear.prepare_linear(weight, CPU)), x, weight, 2**-7)
    assert linear.linear(x[:0], linear.prepare_linear(weight, CPU)).shape == (0, 3)
