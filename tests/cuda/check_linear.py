"""The int8 matmuls against decoded weights in float64, and each other bit for bit. Run by test_on_cpu.py, or on a GPU."""

from __future__ import annotations

import pytest
import torch

from ollamapy import cuda_kernels
from ollamapy.cuda_kernels import MATVEC, MMA, TYPES, Int8Rows
from ollamapy.gguf.types import GGMLType
from ollamapy.triton_kernels.layout import Planes, pack, prepare
from tests.cuda.data import K_QUANTS, activations, expected, int8_rows, random_weight

pytestmark = pytest.mark.gpu
# Groups of a row: one, fewer than the lanes, an odd number, a step and a bit; K-quants: blocks of 8.
WIDTHS = {False: (32, 5 * 32, 17 * 32), True: (256, 768)}


def known() -> list[GGMLType]:
    """Those that the library was built with: under sanitizers, some."""
    return [type for type in sorted(TYPES) if type.name in cuda_kernels.kernels().forms().split()]


def a_k_quant() -> GGMLType:
    return next(type for type in known() if type in K_QUANTS)


def products(x: Int8Rows, weight: Planes, device: torch.device, path: int, columns: int) -> torch.Tensor:
    out = torch.full((x.rows, columns), torch.nan, device=device)
    cuda_kernels.matmul(x, weight, out, path=path)
    return out.cpu()


@pytest.mark.parametrize("type", sorted(TYPES), ids=lambda type: type.name)
def test_products(type: GGMLType, device: torch.device, schedule: str) -> None:
    """Every width and path within the bound of the error, and one number of rows equal to another, bit for bit."""
    if type not in known():
        pytest.skip("not in this library")
    for width in WIDTHS[type in K_QUANTS]:
        columns = 37  # no multiple of any tile
        weight = random_weight(type, columns, width, seed=width)
        planes = pack(weight.to(device))
        x = activations(11, width)
        want, bound = expected(x, weight)
        alone: list[torch.Tensor] = []
        for row in range(3):
            alone.append(products(cuda_kernels.quantize(x[row : row + 1].to(device)), planes, device, MATVEC, columns))
            assert ((alone[-1] - want[row]).abs() <= bound[row]).all(), (width, row)
        for rows in (2, 3, 8) if schedule in ("first-late", "gpu") else (8,):
            several = products(cuda_kernels.quantize(x[:rows].to(device)), planes, device, MATVEC, columns)
            assert ((several - want[:rows]).abs() <= bound[:rows]).all(), (width, rows)
            assert all(torch.equal(several[row], alone[row][0]) for row in range(min(rows, 3)))
        for rows in (1, 11):
            several = products(cuda_kernels.quantize(x[:rows].to(device)), planes, device, MMA, columns)
            assert ((several - want[:rows]).abs() <= bound[:rows]).all(), (width, rows)
            assert all(torch.equal(several[row], alone[row][0]) for row in range(min(rows, 3)))


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0], ids=lambda type: type.name)
def test_many_rows(type: GGMLType, device: torch.device, schedule: str) -> None:
    """Every tile, and more than one of the largest, with the ring of copies going round: the bits of each row alone."""
    if type not in known():
        pytest.skip("not in this library")
    weight = random_weight(type, 40, 3072)
    planes = pack(weight.to(device))
    x = activations(70, 3072)
    want, bound = expected(x, weight)
    alone = products(cuda_kernels.quantize(x[5:6].to(device)), planes, device, MATVEC, 40)
    for rows in (8, 16, 32, 70) if schedule == "first-late" else (70,):
        got = products(cuda_kernels.quantize(x[:rows].to(device)), planes, device, MMA, 40)
        assert ((got - want[:rows]).abs() <= bound[:rows]).all(), rows
        assert torch.equal(got[5], alone[0])


@pytest.mark.parametrize("columns", [17, 48])
def test_onto_a_part_of_an_output(columns: int, device: torch.device, schedule: str) -> None:
    """As q, k and v are written: with a bias, to columns of float16, onto what is there."""
    x, weight = activations(3, 512), random_weight(a_k_quant(), columns, 512, seed=columns)
    planes, bias = pack(weight.to(device)), torch.linspace(-1, 1, columns)
    want = expected(x, weight)[0] + 7 + bias
    for path in (MATVEC, MMA):
        out = torch.full((3, 100), 7.0, dtype=torch.float16, device=device)
        part = out[:, 33 : 33 + columns]
        cuda_kernels.matmul(cuda_kernels.quantize(x.to(device)), planes, part, bias.to(device), add=True, path=path)
        assert (out[:, :33] == 7).all() and (out[:, 33 + columns :] == 7).all()
        assert ((part.cpu() - want).abs() <= want.abs() * 2**-11 + 1e-3).all()


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q8_0], ids=lambda type: type.name)
def test_what_is_not_finite_stays_in_its_row(type: GGMLType, device: torch.device, schedule: str) -> None:
    if type not in known():
        pytest.skip("not in this library")
    x = activations(4, 768)
    x[1, 40], x[2, 700] = torch.inf, torch.nan
    planes = pack(random_weight(type, 16, 768).to(device))
    clean = products(cuda_kernels.quantize(activations(4, 768).to(device)), planes, device, MMA, 16)
    for path in (MATVEC, MMA):
        got = products(cuda_kernels.quantize(x.to(device)), planes, device, path, 16)
        assert got[1:3].isnan().all() and torch.equal(got[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize(dtype: torch.dtype, device: torch.device, schedule: str) -> None:
    """The codes, scales and sums of torch, bit for bit, from rows that are parts of longer ones."""
    x = activations(5, 1152).to(dtype)
    wide = torch.zeros(5, 1312, dtype=dtype, device=device)
    wide[:, 32:1184] = x.to(device)
    made = cuda_kernels.quantize(wide[:, 32:1184])
    codes, scale = int8_rows(x)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    words = codes.to(torch.int8).view(5, -1, 8, 4)[:, :, order].flatten(2)
    assert torch.equal(made.q.cpu().view(torch.int8).transpose(0, 1), words)
    meta = made.meta.cpu().transpose(0, 1)
    assert torch.equal(meta[..., 0].contiguous().view(torch.float32), scale)
    halves = codes.view(5, -1, 2, 16).sum(-1).to(torch.int16)
    assert torch.equal(meta[..., 1].contiguous().view(torch.int16).view(5, -1, 2), halves)


def test_linear(device: torch.device, schedule: str) -> None:
    """The op: any dtype, no rows at all."""
    weight = random_weight(a_k_quant(), 24, 512)
    planes = prepare(weight, device)
    x = activations(3, 512)
    assert cuda_kernels.linear(x[:0].to(device), planes).shape == (0, 24)
    for dtype in (torch.float32, torch.bfloat16):
        want = expected(x.to(dtype), weight)[0]
        got = cuda_kernels.linear(x.to(dtype).to(device), planes)
        assert got.dtype == dtype and ((got.cpu() - want).abs() <= want.abs() * 2**-8 + 1e-3).all()
