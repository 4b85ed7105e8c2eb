"""A row of `linear` must not depend on the rows beside it, bit for bit, at any number of rows and threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ollamapy import ops, reference
from ollamapy.gguf.types import GGMLType
from ollamapy.kernel_table import kernels_for
from ollamapy.ops import Kernel, Place
from ollamapy.quant.tensor import QuantTensor
from tests.ops.tensors import float32

SHAPES = [(576, 576), (576, 192), (1536, 576), (640, 2048), (14336, 64), (36, 7), (64, 5000)]  # K, N
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 130]


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", kernels_for("linear"), ids=lambda kernel: kernel.family)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_do_not_depend_on_each_other(kernel: Kernel, shape: tuple[int, int], threads: int) -> None:
    length, width = shape
    device = torch.device("cpu")
    if kernel.needs(Place(device, GGMLType.F32)) or kernel.prepare is None:
        pytest.skip(kernel.needs(Place(device, GGMLType.F32)))
    torch.manual_seed(0)
    weight = kernel.prepare(float32(torch.randn(width, length)), device)
    x = torch.randn(140, length)
    whole = kernel.fn(x, weight, None)
    for rows in ROWS:
        for first in (0, 140 - rows):
            part = x[first : first + rows].clone()
            assert torch.equal(kernel.fn(part, weight, None), whole[first : first + rows]), rows
    noisy = x.clone()
    noisy[1::2] = 1e30
    assert torch.equal(kernel.fn(noisy, weight, None)[::2], whole[::2])


def test_plain_blas_does_depend_on_them() -> None:
    """Why `linear` pads. When this fails on some machine, its BLAS is better than the rule needs, and nothing is wrong."""
    torch.manual_seed(0)
    weight, x = torch.randn(576, 576), torch.randn(64, 576)
    if not torch.backends.mkl.is_available():
        pytest.skip("measured with MKL")
    whole = torch.nn.functional.linear(x, weight)
    assert not torch.equal(torch.nn.functional.linear(x[:1], weight), whole[:1])
    assert torch.equal(reference.linear(x[:1], weight), whole[:1])


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_values(rows: int) -> None:
    torch.manual_seed(0)
    values, bias, x = torch.randn(70, 96), torch.randn(70), torch.randn(rows, 96)
    weight = ops.prepare(float32(values), torch.device("cpu"), "linear")
    assert isinstance(weight, ops.Weight)
    expected = x.double() @ values.double().T + bias.double()
    torch.testing.assert_close(ops.linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_quantized_weight_is_what_it_decodes_to() -> None:
    torch.manual_seed(0)
    data = torch.randint(0, 256, (24, 2 * 34), dtype=torch.uint8)
    data[:, [0, 34]], data[:, [1, 35]] = 0x66, 0x2E  # scales of 0.1
    quant = QuantTensor(data, GGMLType.Q8_0, (24, 64))
    weight = ops.prepare(quant, torch.device("cpu"), "linear")
    assert isinstance(weight, ops.Weight)
    x = torch.randn(5, 64)
    expected = x.double() @ quant.dequantize().double().T
    torch.testing.assert_close(ops.linear(x, weight).double(), expected, rtol=1e-4, atol=1e-4)


def test_no_rows() -> None:
    assert reference.linear(torch.zeros(0, 8), torch.zeros(3, 8)).shape == (0, 3)
