"""Packing permutes bits: the file's bytes come back, in planes of the same size."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ollamapy.gguf.types import TYPES, GGMLType
from ollamapy.quant.dequant import DEQUANT
from ollamapy.quant.forms import RECODED, planes_nbytes
from ollamapy.quant.tensor import QuantTensor
from ollamapy.triton_kernels import layout, tuning
from ollamapy.triton_kernels.forms import FORMS
from tests.quant.test_dequant import random_blocks

PERMUTED = [type for type in FORMS if type not in RECODED]
KEPT = [*PERMUTED, *layout.DENSE]


def random_bytes(type: GGMLType, *shape: int) -> QuantTensor:
    """All bit patterns, infinities and NaN among the steps."""
    torch.manual_seed(type)
    row = shape[-1] // TYPES[type].block_size * TYPES[type].type_size
    return QuantTensor(torch.randint(0, 256, (*shape[:-1], row), dtype=torch.uint8), type, shape)


def all_bytes(planes: layout.Planes) -> bytes:
    """Of planes as kernels see them: memory, not strides."""
    present = [p for p in (planes.low, planes.high, planes.scales, planes.d, planes.m) if p is not None]
    assert all(p.is_contiguous() for p in present)
    return b"".join(p.view(torch.uint8).numpy().tobytes() for p in present)


@pytest.mark.parametrize("shape", [(2, 256), (3, 768), (2, 5, 512)], ids=str)
@pytest.mark.parametrize("type", KEPT, ids=lambda type: type.name)
def test_round_trip(type: GGMLType, shape: tuple[int, ...]) -> None:
    weight = random_bytes(type, *shape)
    planes = layout.pack(weight)
    back = layout.unpack(planes)
    assert back.type is type and back.shape == shape and torch.equal(back.data, weight.data)
    assert planes.nbytes == weight.nbytes == len(all_bytes(planes)) and planes.shape == shape


@pytest.mark.parametrize("type", PERMUTED, ids=lambda type: type.name)
def test_every_byte_has_its_place(type: GGMLType) -> None:
    """A single changed bit changes the planes, so nothing is stored twice or left out."""
    weight = random_bytes(type, 1, 256)
    whole = all_bytes(layout.pack(weight))
    for byte in range(weight.data.numel()):
        changed = weight.data.clone()
        changed[0, byte] ^= 16
        parts = all_bytes(layout.pack(QuantTensor(changed, type, weight.shape)))
        assert sum((a ^ b).bit_count() for a, b in zip(whole, parts, strict=True)) == 1


@pytest.mark.parametrize("type", [GGMLType.Q4_K, GGMLType.Q6_K], ids=lambda type: type.name)
def test_chunks_change_nothing(type: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_bytes(type, 7, 512)
    whole = layout.pack(weight)
    monkeypatch.setattr(layout, "CHUNK_WEIGHTS", 1024)
    parts = layout.pack(weight)
    assert torch.equal(whole.low, parts.low) and torch.equal(layout.unpack(parts).data, weight.data)


@pytest.mark.parametrize("type", RECODED, ids=lambda type: type.name)
def test_what_is_written_anew(type: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as placement counts, whatever the chunks, and never given for the file's. Values: check_weights.py."""
    weight = QuantTensor.wrap(torch.from_numpy(random_blocks(type, 30)).flatten(), type, (3, 5, 512))
    planes = layout.pack(weight)
    assert planes.nbytes == planes_nbytes(type, (3, 5, 512)) == len(all_bytes(planes)) and planes.shape == (3, 5, 512)
    monkeypatch.setattr(layout, "CHUNK_WEIGHTS", 1024)
    assert all_bytes(layout.pack(weight)) == all_bytes(planes)
    with pytest.raises(AssertionError, match="other bits than the file"):
        layout.unpack(planes)


def test_every_type_has_planes() -> None:
    assert {*KEPT, *RECODED, GGMLType.F64} == set(DEQUANT)
    for type in DEQUANT:
        planes = layout.pack(random_bytes(type, 2, 256))
        assert planes.nbytes == planes_nbytes(type, (2, 256)) and (planes.form is None) == (planes.type not in FORMS)
    assert layout.pack(random_bytes(GGMLType.F64, 2, 256)).low.dtype == torch.bfloat16


def test_packing_needs_no_triton() -> None:
    """Most machines have none: neither the package nor its layout may import it."""
    code = (
        "import ollamapy.triton_kernels, ollamapy.triton_kernels.layout, sys;"
        "print([m for m in sys.modules if m.split('.')[0] == 'triton'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_types_with_tiles_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a table of the launches, and of the one that knows one path: there each type has one tile."""
    own, plain = (layout.pack(random_bytes(type, 2, 256)) for type in (GGMLType.Q4_1, GGMLType.Q4_K))
    table = tuning.read("sm_120")
    monkeypatch.setattr(tuning, "of", lambda device: table)
    assert tuning.of_weight(own).tile(16).groups == 2 and tuning.of_weight(plain).tile(16).groups == 4
    table = tuning.one_path(table)
    assert len(tuning.of_weight(own).tiles) == len(tuning.of_weight(plain).tiles) == 1
