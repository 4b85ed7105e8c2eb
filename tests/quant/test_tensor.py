"""QuantTensor: views, row slices, gathers, and the real files' tensors against gguf-py."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import torch

from ollamapy.gguf.reader import GGUFFile
from ollamapy.gguf.types import GGMLType
from ollamapy.gguf.writer import write_gguf
from ollamapy.quant.tensor import QuantTensor
from tests.quant.test_dequant import random_blocks

ROOT = Path(__file__).parents[2]


def matrix(type: GGMLType, rows: int, blocks_per_row: int) -> QuantTensor:
    blocks = random_blocks(type, rows * blocks_per_row)
    width = {GGMLType.Q4_1: 32, GGMLType.Q6_K: 256}[type]
    return QuantTensor.wrap(torch.from_numpy(blocks.reshape(-1)), type, (rows, blocks_per_row * width))


@pytest.mark.parametrize("type", [GGMLType.Q4_1, GGMLType.Q6_K])
def test_rows_and_gather_equal_slices_of_the_whole(type: GGMLType) -> None:
    weight = matrix(type, 13, 3)
    whole = weight.dequantize()
    part = weight.rows(2, 11)
    assert part.shape == (9, whole.shape[1]) and part.data.data_ptr() == weight.data[2].data_ptr()
    assert torch.equal(part.dequantize(), whole[2:11])
    index = torch.tensor([12, 0, 5, 5, 7])
    assert torch.equal(weight.gather(index), whole[index])
    assert torch.equal(weight.gather(index[:0]), whole[:0])
    assert torch.equal(weight.rows(4, 4).dequantize(), whole[:0])


def test_three_dimensions_and_scalars() -> None:
    blocks = random_blocks(GGMLType.Q4_1, 4 * 3 * 2)
    experts = QuantTensor.wrap(torch.from_numpy(blocks.reshape(-1)), GGMLType.Q4_1, (4, 3, 64))
    assert experts.dequantize().shape == (4, 3, 64) and experts.data.shape == (4, 3, 40)
    assert torch.equal(experts.rows(1, 2).dequantize()[0], experts.dequantize()[1])
    scalar = QuantTensor.wrap(torch.from_numpy(np.array([2.5], "<f4").view(np.uint8)), GGMLType.F32, ())
    assert scalar.dequantize().tolist() == [2.5]


def test_a_tensor_outlives_its_file(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32)
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.architecture": "llama"}, [("w", GGMLType.F32, (3, 4), values)])
    with GGUFFile.open(path) as file:
        tensor = QuantTensor.from_file(file, "w")
    del file
    path.unlink()
    gc.collect()
    assert tensor.dequantize().tolist() == values.reshape(3, 4).tolist()


@pytest.mark.parametrize("model", ["smollm2_path", "gemma3_path"])
def test_real_tensors_equal_gguf_py(model: str, request: pytest.FixtureRequest) -> None:
    with GGUFFile.open(request.getfixturevalue(model)) as file:
        seen: dict[GGMLType, str] = {}
        for name, info in file.tensors.items():
            seen.setdefault(info.type, name)
        for type, name in seen.items():
            tensor = QuantTensor.from_file(file, name)
            rows = tensor.rows(0, 64) if len(tensor.shape) > 1 else tensor
            theirs = gguf.quants.dequantize(rows.data.numpy(), gguf.GGMLQuantizationType(type))
            assert np.array_equal(rows.dequantize().numpy().reshape(-1), theirs.reshape(-1)), name


PEAK = """
import resource, torch
from ollamapy.gguf.types import GGMLType, tensor_nbytes
from ollamapy.quant.tensor import QuantTensor
shape = (16384, 1024)
data = torch.zeros(tensor_nbytes(GGMLType.Q6_K, shape), dtype=torch.uint8)
weight = QuantTensor.wrap(data, GGMLType.Q6_K, shape)
weight.rows(0, 1024).dequantize()  # what torch keeps after its first use is no temporary
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = weight.dequantize()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 - result.numel() * 4)
"""


def test_dequantizing_needs_little_more_than_the_result() -> None:
    """In a process of its own: peak memory is a property of a process."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 32 << 20
